// The rows that teacher_index names. Python checks them too, but not under torch.compile and not for other callers.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// Throws unless all numbers of the int64 tensor `index` are rows of the M teachers.
inline void check_teacher_rows(const torch::stable::Tensor& index, int64_t M) {
  const int64_t* rows = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < M, "teacher_index: expected rows from 0 to ", M - 1, ", got ", rows[i]);
  }
}
