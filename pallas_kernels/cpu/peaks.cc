// The largest values of rows as XLA sees them: a custom call that hands parts of rows to a team of
// threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <string_view>

#include "bindings.h"

namespace pallasite {
namespace {

// Values of a chunk: some microseconds of work, for taking it not to show.
constexpr int64_t kPart = 16 << 10;

struct Outputs {
  float* largest;
  int32_t* places;
  bool* are_finite;
};

void run_peaks(Call& call, const Bodies& bodies, const float* values, int64_t num_rows,
               int64_t num_values, const Outputs& out) {
  const int64_t num_parts = (num_values + kPart - 1) / kPart;
  const auto peaks = reinterpret_cast<Peak*>(
      call.reserve(static_cast<size_t>(num_rows * num_parts) * sizeof(Peak)));
  const int64_t num_peaks = num_rows * num_parts;
  // Of short rows, a chunk has several.
  const int64_t at_once = std::max<int64_t>(kPart / num_values, 1);
  call.run((num_peaks + at_once - 1) / at_once, [&](int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * at_once, num_peaks);
    for (int64_t i = chunk * at_once; i < end; ++i) {
      const int64_t row = i / num_parts, first = i % num_parts * kPart;
      const float* own = values + row * num_values + first;
      peaks[i] = bodies.find_peak(own, std::min(kPart, num_values - first));
      peaks[i].index += static_cast<int32_t>(first);
    }
  });
  for (int64_t row = 0; row < num_rows; ++row) {
    Peak best = peaks[row * num_parts];
    for (int64_t part = 1; part < num_parts; ++part) {
      const Peak& own = peaks[row * num_parts + part];
      const bool is_finite = best.is_finite && own.is_finite;
      if (own.largest > best.largest) best = own;
      best.is_finite = is_finite;
    }
    out.largest[row] = best.largest;
    out.places[row] = best.index;
    out.are_finite[row] = best.is_finite;
  }
}

ffi::Error find_peaks(ffi::ThreadPool pool, ffi::RemainingArgs remaining,
                      ffi::Result<ffi::AnyBuffer> largest, ffi::Result<ffi::AnyBuffer> places,
                      ffi::Result<ffi::AnyBuffer> are_finite, std::string_view instructions) try {
  const Bodies* bodies = choose(instructions).bodies;
  if (bodies == nullptr) {
    return invalid("got a program for a processor with " + std::string(instructions) +
                   "; this one lacks it; compile the program here");
  }
  Arguments args(remaining);
  const ffi::AnyBuffer values = args.take("the values", {Type::F32});
  if (!args.error().empty()) return invalid(args.error());
  const auto shape = values.dimensions();
  if (shape.size() != 2 || shape[1] < 1 || shape[1] > std::numeric_limits<int32_t>::max()) {
    return invalid("got the values " + shown(shape) + "; they must be [B, V], with V from 1 to " +
                   std::to_string(std::numeric_limits<int32_t>::max()));
  }
  const int64_t num_rows = shape[0];
  args.fail(buffer_fault("the largest", *largest, {Type::F32}, {num_rows}));
  args.fail(buffer_fault("their places", *places, {Type::S32}, {num_rows}));
  args.fail(buffer_fault("are_finite", *are_finite, {Type::PRED}, {num_rows}));
  if (!args.error().empty()) return invalid(args.error());
  Call call(pool);
  run_peaks(call, *bodies, data<float>(values), num_rows, shape[1],
            {static_cast<float*>(largest->untyped_data()),
             static_cast<int32_t*>(places->untyped_data()),
             static_cast<bool*>(are_finite->untyped_data())});
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "got no memory for the largest values");
}

}  // namespace
}  // namespace pallasite

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasiteFindPeaks, pallasite::find_peaks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("instructions"));
