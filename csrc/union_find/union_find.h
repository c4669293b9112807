// Connected components by disjoint sets over an array with the parent of each node, 4 or 8 bytes per node.
//
// The higher of two roots is linked to the lower one. So a parent never has a higher number than its children, the root
// of a component is its lowest node, and the result does not depend on the order of edges. A search halves its path
// (Tarjan and van Leeuwen, 1984): the amortised time of an edge is O(log nodes), nearly constant in practice.
#pragma once

#include <cstdint>

template <typename Node>
Node find_root(Node* parent, Node node) {
  while (parent[node] != node) node = parent[node] = parent[parent[node]];
  return node;
}

template <typename Node>
void join_components(Node* parent, const std::int64_t* first, const std::int64_t* second, std::int64_t num_edges) {
  for (std::int64_t edge = 0; edge < num_edges; ++edge) {
    const Node a = find_root(parent, static_cast<Node>(first[edge]));
    const Node b = find_root(parent, static_cast<Node>(second[edge]));
    if (a < b) parent[b] = a;
    else parent[a] = b;
  }
}

// A parent comes before its children, so its own parent is already the root.
template <typename Node>
void label_components(Node* parent, std::int64_t num_nodes) {
  for (std::int64_t node = 0; node < num_nodes; ++node) parent[node] = parent[parent[node]];
}
