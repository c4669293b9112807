// Connected components by disjoint sets over an array that holds a parent of each node, 4 or 8 bytes a node.
//
// A root is linked under the lower of two roots, so parents never have a higher number than their children, the root of
// a component is its lowest node, and the result does not depend on the order of edges. Paths are halved on the way
// (Tarjan and van Leeuwen, 1984): amortised time of an edge is O(log nodes), near constant in practice.
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

// Parents come before their children, so that theirs is the root already.
template <typename Node>
void label_components(Node* parent, std::int64_t num_nodes) {
  for (std::int64_t node = 0; node < num_nodes; ++node) parent[node] = parent[parent[node]];
}
