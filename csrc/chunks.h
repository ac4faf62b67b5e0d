// How a list of tensors is cut into pieces of work: host and device, written once. No torch headers.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace ewc {

// One task, at most: a thread's share on the CPU, a block's on the GPU, where small models get smaller ones. Each has a
// slot of its own for its partial sums, and the slots are added in order, so that a sum depends neither on the number of
// threads nor on who took which chunk.
constexpr int64_t kChunk = 32768;

// Sums run in the math type over so many elements and in fp64 from there on: a long fp32 sum loses whole percents.
constexpr int64_t kBlock = 2048;

// One tensor of a list, as an op takes it.
struct Entry {
  const void* param;
  void* grad;      // null where the op writes no gradient
  int64_t offset;  // in elements, into anchor and Fisher
  int64_t numel;
};

constexpr int kMaxLists = 5;  // of an optimizer's op: parameters, gradients, and up to three of its own

// One tensor of each of an optimizer's lists.
struct StepEntry {
  void* data[kMaxLists];  // null where the op has no such list
  int64_t offset;         // in elements, into anchor and Fisher; -1: the parameter is not protected
  int64_t numel;
};

// One tensor of a list of Fishers, and the rows of gradients whose squares are added to it; all in the same memory order.
struct FisherEntry {
  void* fisher;
  const void* grad;
  int64_t numel;
  int64_t rows;    // at least 1
  int64_t stride;  // in elements, from row to row
};

// An empty tensor has no chunk, and so no slot.
EWC_HD int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The tensor that a chunk belongs to: the last one that starts at or before it. `first` holds each tensor's first chunk,
// in rising order; among empty tensors, which share their successor's, the last is the one that has the chunk.
template <typename Index>
EWC_HD int64_t tensor_of_chunk(const Index* first, int64_t num_tensors, int64_t chunk) {
  int64_t low = 0, high = num_tensors;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (static_cast<int64_t>(first[middle]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace ewc
