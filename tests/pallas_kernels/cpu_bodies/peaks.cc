#include "peaks.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "faults.h"

namespace check {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Case {
  int64_t num_rows, num_values;
  bool has_ties;
  std::vector<float> values, largest;
  std::vector<int32_t> firsts;
  std::vector<uint8_t> are_finite;

  std::string shown() const {
    return text("peaks of ", num_rows, " rows of ", num_values, ", ties ", has_ties);
  }

  static Case make(Random& random) {
    Case made{};
    made.num_values = random.any_size(1, 50000);
    made.num_rows = random.whole(0, random.any_size(1, 100000 / made.num_values + 1));
    made.has_ties = random.chance(0.3);
    made.values = random.normals(made.num_rows * made.num_values);
    for (float& value : made.values) {
      if (made.has_ties) value = std::nearbyint(value);
    }
    for (int64_t row = 0; row < made.num_rows; ++row) {
      while (random.chance(0.3)) {
        const int64_t place = row * made.num_values + random.whole(0, made.num_values - 1);
        made.values[static_cast<size_t>(place)] =
            random.one_of({kNaN, kInfinity, -kInfinity, -kInfinity, 9.0f, 9.0f, 0.0f, -0.0f});
      }
    }
    const auto rows = static_cast<size_t>(made.num_rows);
    made.largest.assign(rows, kNaN);
    made.firsts.assign(rows, -7);
    made.are_finite.assign(rows, 7);
    return made;
  }

  Invocation invocation(const std::string& instructions) {
    Buffer finite = view("are_finite", are_finite, {num_rows});
    finite.type = XLA_FFI_DataType_PRED;
    return {PallasiteFindPeaks,
            {view("the values", values, {num_rows, num_values})},
            {view("the largest", largest, {num_rows}), view("their places", firsts, {num_rows}),
             finite},
            {{"instructions", instructions}}};
  }

  void check_row(int64_t row) const {
    const float* own = values.data() + row * num_values;
    const auto at = static_cast<size_t>(row);
    bool is_finite = true, has_nan = false;
    int64_t first = 0;
    for (int64_t i = 0; i < num_values; ++i) {
      is_finite = is_finite && own[i] < kInfinity;
      has_nan = has_nan || std::isnan(own[i]);
      if (own[i] > own[first]) first = i;
    }
    if (are_finite[at] != static_cast<uint8_t>(is_finite)) {
      throw Wrong(text("row ", row, " is said to be finite: ", int{are_finite[at]}));
    }
    if (has_nan) first = firsts[at];
    if (firsts[at] != first || first < 0 || first >= num_values) {
      throw Wrong(text("row ", row, " has its largest at ", firsts[at], " and not at ", first));
    }
    // Zeros of both signs are equal.
    if (!has_nan && !(largest[at] == own[first])) {
      throw Wrong(text("row ", row, " has ", largest[at], " and not ", own[first]));
    }
  }
};

}  // namespace

std::string check_peaks(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  const std::string error = call(made.invocation(instructions), pool);
  if (!error.empty()) throw Wrong(made.shown() + ": " + error);
  try {
    for (int64_t row = 0; row < made.num_rows; ++row) made.check_row(row);
  } catch (const Wrong& wrong) {
    throw Wrong(made.shown() + ": " + wrong.what());
  }
  return made.shown();
}

int refuse_peaks(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  Faults faults([&] { return made.invocation(instructions); }, random, pool);
  faults.refuse_each();
  faults.refuse("got a program for a processor with none",
                [](Invocation& invocation) { invocation.attributes["instructions"] = "none"; });
  const auto reshape = [](Buffer& buffer, std::vector<int64_t> shape) { buffer.shape = shape; };
  faults.refuse("got the values [", [&](Invocation& invocation) {
    reshape(invocation.arguments[0], {made.num_rows * made.num_values});
  });
  faults.refuse("got the values [", [&](Invocation& invocation) {
    reshape(invocation.arguments[0], {made.num_rows, 0});
  });
  for (size_t i = 0; i < 3; ++i) {
    const std::string name = made.invocation(instructions).results[i].name;
    faults.refuse("got " + name + " [", [&](Invocation& invocation) {
      reshape(invocation.results[i], {made.num_rows + 1});
    });
  }
  faults.survive(40);
  return faults.num_refused();
}

}  // namespace check
