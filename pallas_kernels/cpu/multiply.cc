// Products as XLA sees them: a custom call that rounds rows, multiplies them and hands strips of the
// matrices to a team of threads.

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace pallasite {
namespace {

// Takes a matrix [L, strips, ...] of `num_layers` layers, or [strips, ...] of none, and returns the
// layer's.
Matrix take_matrix(Arguments& args, int64_t layer) {
  Matrix matrix{};
  const ffi::AnyBuffer values = args.take("a matrix's values", {Type::U8, Type::U16});
  if (!args.error().empty()) return matrix;
  const auto shape = values.dimensions();
  const bool is_bfloat16 = values.element_type() == Type::U16;
  const size_t own_rank = is_bfloat16 ? 4 : 5;
  const bool is_stacked = shape.size() == own_rank + 1;
  if (!is_stacked && shape.size() != own_rank) {
    args.fail("got a matrix's values " + shown(shape) + "; they must have " +
              std::to_string(own_rank) + " axes, and one of layers");
    return matrix;
  }
  const size_t first = is_stacked ? 1 : 0;
  const int64_t num_layers = is_stacked ? shape[0] : 1;
  const int64_t index = is_stacked ? layer : 0;
  if (index < 0 || index >= num_layers) {
    args.fail("got layer " + std::to_string(layer) + " of " + std::to_string(num_layers));
    return matrix;
  }
  matrix.num_strips = shape[first];
  const int64_t num_groups = shape[first + 1];
  const int64_t size = values.element_count() / num_layers * (is_bfloat16 ? 2 : 1);
  matrix.values = data<uint8_t>(values) + index * size;
  if (is_bfloat16) {
    matrix.kind = Kind::kBfloat16;
    matrix.num_inputs = 2 * num_groups;
    if (shape[first + 2] != kLanes || shape[first + 3] != 2) {
      args.fail("got a matrix's values " + shown(shape) + "; they must end in [16, 2]");
    }
    return matrix;
  }
  const int64_t num_vectors = shape[first + 2];
  if ((num_vectors != 4 && num_vectors != 8) || shape[first + 3] != kLanes ||
      shape[first + 4] != 4) {
    args.fail("got a matrix's values " + shown(shape) +
              "; they must end in [4, 16, 4] or [8, 16, 4]");
    return matrix;
  }
  matrix.kind = num_vectors == 4 ? Kind::kNibbles : Kind::kBytes;
  matrix.num_inputs = num_groups * kGroup;
  std::vector<int64_t> scales_shape;
  if (is_stacked) scales_shape.push_back(num_layers);
  scales_shape.insert(scales_shape.end(), {matrix.num_strips, num_groups, kLanes});
  const auto take_layer = [&](const char* name) {
    const ffi::AnyBuffer all = args.take(name, {Type::F16, Type::F32}, scales_shape);
    const bool is_half = all.element_type() == Type::F16;
    const int64_t offset = index * matrix.num_strips * num_groups * kLanes * (is_half ? 2 : 4);
    return std::pair(is_half, data<uint8_t>(all) + offset);
  };
  std::tie(matrix.has_half_scales, matrix.scales) = take_layer("a matrix's scales");
  if (matrix.kind == Kind::kNibbles) {
    const auto [is_half, minimums] = take_layer("a matrix's minimums");
    if (is_half != matrix.has_half_scales) {
      args.fail("got a matrix's scales and minimums of two types; they must be of one");
    }
    matrix.minimums = minimums;
  }
  return matrix;
}

// Takes a norm's scale [L, inputs] or [inputs], and returns the layer's.
const float* take_norm(Arguments& args, int64_t layer, int64_t num_inputs) {
  const ffi::AnyBuffer norm = args.take("the norm", {Type::F32});
  const auto shape = norm.dimensions();
  const int64_t num_layers = shape.size() == 2 ? shape[0] : 1;
  if (shape.size() == 0 || shape.size() > 2 || shape.back() != num_inputs) {
    args.fail("got a norm " + shown(shape) + " for " + std::to_string(num_inputs) + " inputs");
  } else if (shape.size() == 2 && (layer < 0 || layer >= num_layers)) {
    args.fail("got layer " + std::to_string(layer) + " of " + std::to_string(num_layers));
  }
  if (!args.error().empty()) return nullptr;
  return data<float>(norm) + (shape.size() == 2 ? layer * num_inputs : 0);
}

// Rows of x that are multiplied before the next ones: they stay in the second-level cache while all
// strips pass. Where there are many, each thread has rows of its own: what it has rounded, and what
// it writes for the next operation, is then seldom another's, whose caches may be far away.
int64_t rows_at_once(const Product& product, int64_t num_rows, int64_t num_threads) {
  constexpr int64_t kBytes = 384 << 10, kFewest = 4 * kTileRows;
  const bool is_bfloat16 = product.matrices[0].kind == Kind::kBfloat16;
  const int64_t row_bytes = product.x.num_inputs * (is_bfloat16 ? 2 : 1);
  const int64_t num_blocks = std::max<int64_t>(std::min(num_threads, num_rows / kFewest), 1);
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const int64_t most = std::max<int64_t>(kBytes / row_bytes / kTileRows, 1);
  return std::min(most, (num_tiles + num_blocks - 1) / num_blocks) * kTileRows;
}

// Rows of a chunk of those that are rounded: a few are rounded sooner than handed out, and a line of
// memory has more than one row's.
int64_t rows_rounded_at_once(int64_t num_inputs, int64_t num_rows, int64_t num_threads) {
  constexpr int64_t kMostValues = 32 << 10, kFewestRows = 4;
  const int64_t share = (num_rows + num_threads - 1) / num_threads;
  const int64_t rows = std::min(share, kMostValues / num_inputs);
  return std::max<int64_t>((rows + kFewestRows - 1) / kFewestRows, 1) * kFewestRows;
}

// Strips of a chunk: enough work, some microseconds, for taking it not to show.
int64_t strips_at_once(const Product& product, int64_t num_rows) {
  constexpr int64_t kMacs = 1 << 18;
  const int64_t strip_macs = product.x.num_inputs * kLanes * std::max<int64_t>(num_rows, 4);
  const int64_t strips = std::max<int64_t>(kMacs / strip_macs, 1);
  const bool has_pairs = num_rows >= kFewestPairedRows && !product.is_gated;
  return has_pairs ? (strips + 1) / 2 * 2 : strips;
}

// Units of memory that bodies fetch beside some strips for some rows: see `kFewestFetchingRows`.
int64_t units_beside(const Product& product, int64_t num_strips, int64_t num_rows) {
  if (product.matrices[0].kind == Kind::kBfloat16) return 0;
  const int64_t rest = num_rows % kTileRows >= kFewestFetchingRows ? 1 : 0;
  const int64_t num_groups = product.x.num_inputs / kGroup * (product.is_gated ? 2 : 1);
  return (num_rows / kTileRows + rest) * num_groups * num_strips;
}

// Rows [begin, end) that are computed; `begin` is a tile's.
struct Rows {
  int64_t begin, end;
};

// Runs of rows, in order, and how they are cut into parts of `size` rows at most.
struct Runs {
  const Rows* first;
  const Rows* last;

  int64_t num_rows() const {
    int64_t count = 0;
    for (const Rows* run = first; run != last; ++run) count += run->end - run->begin;
    return count;
  }

  int64_t num_parts(int64_t size) const {
    int64_t count = 0;
    for (const Rows* run = first; run != last; ++run) {
      count += (run->end - run->begin + size - 1) / size;
    }
    return count;
  }

  Rows part(int64_t index, int64_t size) const {
    const Rows* run = first;
    for (;; ++run) {
      const int64_t own = (run->end - run->begin + size - 1) / size;
      if (index < own) break;
      index -= own;
    }
    const int64_t begin = run->begin + index * size;
    return {begin, std::min(begin + size, run->end)};
  }
};

// The rows of tiles that have any wanted one.
std::vector<Rows> wanted_runs(const uint8_t* wanted, int64_t num_rows) {
  std::vector<Rows> runs;
  for (int64_t begin = 0; begin < num_rows; begin += kTileRows) {
    const int64_t end = std::min(begin + kTileRows, num_rows);
    if (std::all_of(wanted + begin, wanted + end, [](uint8_t own) { return own == 0; })) continue;
    if (!runs.empty() && runs.back().end == begin) {
      runs.back().end = end;
    } else {
      runs.push_back({begin, end});
    }
  }
  return runs;
}

// Computes the rows of some runs; `num_rows` is where the last may end.
void run_product(Call& call, const Bodies& bodies, const Rounding& rounding, Product product,
                 const Runs& runs, int64_t num_rows) {
  const int64_t num_inputs = rounding.num_inputs, num_groups = num_inputs / kGroup;
  product.x.num_inputs = num_inputs;
  if (rounding.to_bfloat16) {
    product.x.halves =
        reinterpret_cast<uint16_t*>(call.reserve(static_cast<size_t>(num_rows * num_inputs * 2)));
  } else {
    const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    const int64_t size = num_tiles * kTileRows * num_inputs;
    const int64_t groups_size = num_tiles * kTileRows * num_groups * sizeof(Group);
    std::byte* at = call.reserve(static_cast<size_t>(size + groups_size));
    product.x.values = reinterpret_cast<int8_t*>(at);
    product.x.groups = reinterpret_cast<Group*>(at + size);
  }
  const int64_t rows_a_chunk = rows_rounded_at_once(num_inputs, runs.num_rows(), call.num_threads());
  call.run(runs.num_parts(rows_a_chunk), [&](int64_t chunk) {
    const Rows rows = runs.part(chunk, rows_a_chunk);
    bodies.round_rows(rounding, product.x, rows.begin, rows.end);
  });

  const int64_t num_parts = product.is_gated ? 1 : product.num_matrices;
  int64_t num_strips = 0;
  for (int64_t i = 0; i < num_parts; ++i) num_strips += product.matrices[i].num_strips;
  const int64_t num_wanted = runs.num_rows();
  const int64_t rows = rows_at_once(product, num_wanted, call.num_threads());
  const int64_t strips = strips_at_once(product, std::min(rows, num_wanted));
  const int64_t num_chunks = (num_strips + strips - 1) / strips;
  const int64_t num_all = runs.num_parts(rows) * num_chunks;
  call.run(num_all, [&](int64_t chunk) {
    const Rows block = runs.part(chunk / num_chunks, rows);
    int64_t begin = chunk % num_chunks * strips;
    int64_t end = std::min(begin + strips, num_strips);
    const int64_t units = units_beside(product, end - begin, block.end - block.begin);
    Upcoming upcoming = call.take_expected(chunk, num_all, units);
    Product own_product = product;
    own_product.upcoming = &upcoming;
    // Strips are counted over all matrices.
    for (int64_t i = 0; i < num_parts && begin < end; ++i) {
      const int64_t own = product.matrices[i].num_strips;
      if (begin < own) {
        bodies.multiply(own_product, i, begin, std::min(end, own), block.begin, block.end);
      }
      begin = std::max<int64_t>(begin - own, 0);
      end -= own;
    }
  });
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::RemainingArgs remaining,
                    ffi::Result<ffi::AnyBuffer> out, std::string_view instructions, bool has_count,
                    bool has_wanted, bool has_norm, bool has_residual, int32_t gate, float epsilon) try {
  const Bodies* bodies = choose(instructions).bodies;
  if (bodies == nullptr) {
    return invalid("got a program for a processor with " + std::string(instructions) +
                   "; this one lacks it; compile the program here");
  }
  Arguments args(remaining);
  const ffi::AnyBuffer x = args.take("x", {Type::F32});
  const ffi::AnyBuffer layer = args.take("the layer", {Type::S32}, {});
  if (!args.error().empty()) return invalid(args.error());
  if (x.dimensions().size() != 2) {
    return invalid("got x " + shown(x.dimensions()) + "; it must be [T, inputs]");
  }
  const int64_t num_rows = x.dimensions()[0], num_inputs = x.dimensions()[1];
  int64_t num_used = num_rows;
  if (has_count) {
    const ffi::AnyBuffer count = args.take("the count", {Type::S32}, {});
    if (args.error().empty()) num_used = *data<int32_t>(count);
    if (num_used < 0 || num_used > num_rows) {
      return invalid("got " + std::to_string(num_used) + " rows in use of " +
                     std::to_string(num_rows));
    }
  }
  const uint8_t* wanted = nullptr;
  if (has_wanted) {
    const ffi::AnyBuffer mask = args.take("the wanted rows", {Type::PRED}, {num_rows});
    if (!args.error().empty()) return invalid(args.error());
    wanted = data<uint8_t>(mask);
  }
  if (out->dimensions().size() != 2) {
    return invalid("got outputs " + shown(out->dimensions()) + "; they must be [T, outputs]");
  }
  const int64_t num_outputs = out->dimensions()[1];
  Rounding rounding{data<float>(x), num_inputs, nullptr, epsilon, false};
  if (has_norm) {
    rounding.norm = take_norm(args, *data<int32_t>(layer), num_inputs);
  }
  Product product{};
  product.out = static_cast<float*>(out->untyped_data());
  product.num_outputs = num_outputs;
  if (has_residual) {
    product.residual = data<float>(args.take("the residual", {Type::F32}, {num_rows, num_outputs}));
  }
  std::vector<Matrix> matrices;
  while (args.has_more() && args.error().empty()) {
    matrices.push_back(take_matrix(args, *data<int32_t>(layer)));
  }
  if (!args.error().empty()) return invalid(args.error());
  product.matrices = matrices.data();
  product.num_matrices = static_cast<int64_t>(matrices.size());
  product.is_gated = gate >= 0;
  product.activation = static_cast<Activation>(gate);
  if (matrices.empty() || (product.is_gated && matrices.size() != 2)) {
    return invalid("got " + std::to_string(matrices.size()) + " matrices; a gate takes two, any"
                   " other product one at least");
  }
  const Matrix& first = matrices[0];
  rounding.to_bfloat16 = first.kind == Kind::kBfloat16;
  int64_t strips = 0;
  for (const Matrix& matrix : matrices) {
    strips += matrix.num_strips;
    if (matrix.num_inputs != num_inputs) {
      return invalid("got " + std::to_string(num_inputs) + " inputs for a matrix of " +
                     std::to_string(matrix.num_inputs));
    }
    if ((matrix.kind == Kind::kBfloat16) != rounding.to_bfloat16) {
      return invalid("got matrices of bfloat16 and of integers in one product");
    }
    if (product.is_gated && matrix.num_strips != first.num_strips) {
      return invalid("got a gate and its values with different numbers of outputs");
    }
  }
  if (num_inputs == 0 || num_inputs % kGroup != 0) {
    return invalid("got " + std::to_string(num_inputs) + " inputs; they must be a multiple of 32");
  }
  const int64_t expected = (product.is_gated ? first.num_strips : strips) * kLanes;
  if (const std::string fault =
          buffer_fault("the outputs", *out, {Type::F32}, {num_rows, expected});
      !fault.empty()) {
    return invalid(fault);
  }
  std::vector<Rows> some;
  Rows all{0, num_used};
  Runs runs{&all, &all + 1};
  if (wanted != nullptr) {
    some = wanted_runs(wanted, num_used);
    runs = {some.data(), some.data() + some.size()};
  }
  if (runs.num_rows() == 0) return ffi::Error::Success();
  // Rows far apart share few lines of a cache: those of an output head's, stored there, would have
  // each store wait for memory that is overwritten.
  constexpr int64_t kFarApart = 16384;
  product.stores_away = num_outputs >= kFarApart && num_used > 1 &&
                        reinterpret_cast<uintptr_t>(product.out) % 64 == 0;
  Call call(pool);
  run_product(call, *bodies, rounding, product, runs, num_used);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "got no memory for a product's inputs");
}

}  // namespace
}  // namespace pallasite

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasiteMultiply, pallasite::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("instructions")
                                  .Attr<bool>("has_count")
                                  .Attr<bool>("has_wanted")
                                  .Attr<bool>("has_norm")
                                  .Attr<bool>("has_residual")
                                  .Attr<int32_t>("gate")
                                  .Attr<float>("epsilon"));
