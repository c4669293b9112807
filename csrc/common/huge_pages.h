// Huge pages for a large result, requested before it is written for the first time.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// Ask for pages of 2 MB within [p, p + bytes): a new allocation is mapped while it is written, and mapping 4 KB at a
// time costs several times as much as the writes. It is only a hint. It adds no memory: no page crosses the ends.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
