// What the bodies of one instruction set are, as the bindings call them, and what they are given.
//
// Each body_*.cc compiles the same kernels for one instruction set, in a namespace of its own, and
// hands out a table of functions. Which table is used is decided once, by what the processor has.

#ifndef PALLASITE_BODIES_H_
#define PALLASITE_BODIES_H_

#include <cstddef>
#include <cstdint>

namespace pallasite {

// Rows of a matrix side by side in a strip: the lanes of the kernels.
constexpr int64_t kLanes = 16;
// Inputs that share a scale.
constexpr int64_t kGroup = 32;
enum class Kind : int32_t { kNibbles = 0, kBytes = 1, kBfloat16 = 2 };
enum class Activation : int32_t { kSilu = 0, kGelu = 1 };

// One layer's matrix in strips of 16 rows. Integers stand, for each strip and each group of 32
// inputs, in the order that the kernels read them:
//   nibbles: [strips, groups, 4, 16 rows, 4]: a byte has input 4 j + i of the group in its low
//            bits, for the j-th vector and the i-th byte, and input 16 + 4 j + i in its high ones.
//   bytes:   [strips, groups, 8, 16 rows, 4]: input 4 j + i, plus 128.
//   floats:  [strips, inputs / 2, 16 rows, 2] of bfloat16.
// Scales and minimums are [strips, groups, 16 rows], of float16 or f32.
struct Matrix {
  Kind kind;
  bool has_half_scales;
  int64_t num_strips;
  int64_t num_inputs;
  const uint8_t* values;
  const void* scales;
  const void* minimums;  // of nibbles
};

// Rows of x that lie together, group by group, as the widest tile of a product takes them.
constexpr int64_t kTileRows = 12;

// Rows from which on bodies may take two strips at once.
constexpr int64_t kFewestPairedRows = 48;

// Rows of a tile of integers from which on bodies wait for dots and leave memory idle, so that they
// fetch what a later operation reads: a unit of it for each group of inputs. Two strips at once do not.
constexpr int64_t kFewestFetchingRows = 8;

// 32 inputs of a row, which are scale * integer, but for the largest of them: to its integer a float
// is added. One that stands out would leave the others but a few of 255 integers. The float is all of
// it and the integer 0, but where bodies take it as bfloat16: then the integer is what that leaves.
struct Group {
  float scale;
  float largest;
  int32_t place;      // which one it is
  float sum;          // of all, as they are held
  int32_t whole_sum;  // of the integers
  // For nibbles, where bodies take it as bfloat16: see groups.h.
  uint32_t pair;
  float middle;
  int32_t offset;
  uint32_t mask;
};

// Rows of x as products take them: int8 in groups, or bfloat16.
struct Rounded {
  int64_t num_inputs;
  int8_t* values;    // [T / 12, groups, 12 rows, 32]
  Group* groups;     // [T / 12, groups, 12 rows]
  uint16_t* halves;  // [T, inputs], bfloat16

  // Where a row's first group is among all; the next one is kTileRows further.
  int64_t first_group(int64_t row) const {
    return row / kTileRows * (num_inputs / kGroup) * kTileRows + row % kTileRows;
  }
};

// How rows become what products take.
struct Rounding {
  const float* x;         // [T, inputs]
  int64_t num_inputs;
  const float* norm;      // [inputs]: a root-mean-square norm's scale; null for no norm
  float epsilon;
  bool to_bfloat16;
};

// Bytes that are fetched at once, a unit; they divide what pages have.
constexpr int64_t kFetched = 256;

// Memory that a later operation reads: units [next, last), counted over all pages, and what is left
// of those that were begun.
struct Upcoming {
  const std::byte* const* pages;
  int64_t page_size;
  int64_t next;
  int64_t last;
  const std::byte* begin;
  const std::byte* end;

  // Returns where the next unit is, null after the last.
  const std::byte* take() {
    if (begin == end) {
      if (next >= last) return nullptr;
      const int64_t units = page_size / kFetched, first = next % units;
      const int64_t count = units - first < last - next ? units - first : last - next;
      begin = pages[next / units] + first * kFetched;
      end = begin + count * kFetched;
      next += count;
    }
    const std::byte* const at = begin;
    begin += kFetched;
    return at;
  }
};

// Products of rounded rows with matrices that lie one after another in the outputs.
struct Product {
  Rounded x;
  const Matrix* matrices;  // with `is_gated`: gate and up
  int64_t num_matrices;
  float* out;              // [T, outputs]
  int64_t num_outputs;
  bool stores_away;        // `out` lies on lines of memory, and is larger than caches should hold
  const float* residual;   // [T, outputs], added; null for none
  Upcoming* upcoming;      // what may be fetched meanwhile
  bool is_gated;           // activation(gate) * up
  Activation activation;
};

enum class CacheType : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// One layer of a paged cache, [P, K, 2, page, H].
struct Cache {
  CacheType type;
  std::byte* values;
  float* scales;           // [P, K, 2, page] for int8
  int64_t num_pages;
  int64_t num_kv_heads;
  int64_t page_size;
  int64_t head_width;
};

struct Attention {
  Cache cache;
  // A token's heads lie one after another, and tokens are `stride` floats apart.
  const float* q;          // [T, N, H]
  const float* k_new;      // [T, K, H]
  const float* v_new;      // [T, K, H]
  int64_t stride;
  // Rotary embedding of queries and keys: the first 2 * `num_pairs` dimensions are turned.
  const float* cosines;    // [T, pairs]
  const float* sines;      // [T, pairs]
  int64_t num_pairs;       // 0 for none
  float* out;              // [T, N, H]
  int64_t num_heads;
  const int32_t* positions;
  const int32_t* kv_lens;
  const int32_t* query_starts;
  const int32_t* page_table;  // [B, M]
  int64_t pages_per_request;
  float scale;
  float soft_cap;          // 0 for none
  int64_t window;          // 0 for none
  const float* sinks;      // [N], or null
};

// Some queries of one request, some of its key heads, and the keys [key_begin, key_end) that one
// thread attends for them. `part` is null where these are all keys that the queries see; else the
// thread leaves there, for each key head, query and head, the largest score over ln 2, the sum of
// weights and the values.
struct Task {
  int32_t request;
  int32_t first_kv_head;
  int32_t num_kv_heads;
  int32_t first_token;  // of the flat axis
  int32_t num_tokens;
  int32_t key_begin;
  int32_t key_end;
  bool has_sinks;       // whether the sinks count among these keys
  int32_t part_index;   // of the parts that are merged later; -1 for none
  float* part;          // [kv heads * tokens * N / K, 2 + H]
};

// The largest of some values, NaNs left out where the processor does so, and where it stands first;
// whether all are below infinity, which NaN is not. `largest` and `index` mean nothing beside a NaN,
// but `index` is one of theirs.
struct Peak {
  float largest;
  int32_t index;
  bool is_finite;
};

struct Bodies {
  // Whether tiles have as many rows as those that fetch.
  bool fetches;
  // Rounds rows [begin, end).
  void (*round_rows)(const Rounding&, const Rounded&, int64_t begin, int64_t end);
  // Fills outputs of strips [begin, end) of matrix `index`, for rows [row_begin, row_end).
  void (*multiply)(const Product&, int64_t index, int64_t begin, int64_t end, int64_t row_begin,
                   int64_t row_end);
  // Writes the new keys and values of tokens [begin, end) of a request.
  void (*write_rows)(const Attention&, int64_t request, int64_t begin, int64_t end);
  // Bytes of scratch that `attend` needs for a task of so many rows, a query's head each, of so
  // many key heads.
  size_t (*attend_scratch)(const Attention&, int64_t num_rows, int64_t num_kv_heads);
  // Attends; `next` is what this thread will do then, as far as is known, or null.
  void (*attend)(const Attention&, const Task&, const Task* next, std::byte* scratch);
  // Makes the outputs of a token of the parts that tasks of all its key heads have left.
  void (*merge)(const Attention&, int64_t token, const float* parts, int64_t num_parts);
  // Looks through `size` values, of which there is one at least.
  Peak (*find_peak)(const float* values, int64_t size);
};

}  // namespace pallasite

#endif  // PALLASITE_BODIES_H_
