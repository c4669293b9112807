// Grids and clusters of the stand-in; see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct grid_group {
  void sync(std::source_location where = std::source_location::current()) const {
    cuda_shim::Block::current->wait(cuda_shim::AT_GRID, where);
  }
};

inline grid_group this_grid() { return {}; }

struct cluster_group {
  void sync(std::source_location where = std::source_location::current()) const {
    cuda_shim::Block::current->wait(cuda_shim::AT_CLUSTER, where);
  }
  unsigned num_blocks() const { return cuda_shim::Block::current->together.size(); }
  unsigned block_rank() const { return cuda_shim::Block::current->index.x % num_blocks(); }

  // Where the block of that rank has what `pointer`, into dynamic shared memory, points at here.
  template <typename T>
  T* map_shared_rank(T* pointer, int rank) const {
    const cuda_shim::Block& block = *cuda_shim::Block::current;
    const auto offset = reinterpret_cast<char*>(pointer) - block.dynamic_shared.get();
    return reinterpret_cast<T*>(block.together.at(rank)->dynamic_shared.get() + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
