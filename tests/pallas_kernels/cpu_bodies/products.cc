#include "products.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "faults.h"

namespace check {
namespace {

constexpr int64_t kLanes = 16, kGroup = 32, kTileRows = 12;
constexpr double kUnit = 0x1p-24;
// Of a rounding's step: closer to a tie than this, either side is right.
constexpr double kNearTie = 1e-3;

enum class Kind { kNibbles, kBytes, kBfloat16 };

struct Matrix {
  Kind kind;
  int64_t num_strips;
  int64_t num_groups;
  int64_t num_layers;  // 0 for a matrix that is not stacked
  std::vector<uint8_t> codes;
  std::vector<uint16_t> floats;
  std::vector<float> scales, minimums;
  std::vector<Half> half_scales, half_minimums;
  bool has_halves;

  int64_t num_outputs() const { return num_strips * kLanes; }

  // The integer, or the number, that stands for one weight.
  double weight(int64_t layer, int64_t output, int64_t input) const {
    const int64_t strip = (num_layers == 0 ? 0 : layer) * num_strips + output / kLanes;
    const int64_t lane = output % kLanes;
    if (kind == Kind::kBfloat16) {
      const int64_t pair = strip * num_groups * kGroup / 2 + input / 2;
      return from_bfloat16(floats[static_cast<size_t>((pair * kLanes + lane) * 2 + input % 2)]);
    }
    const int64_t group = strip * num_groups + input / kGroup, own = input % kGroup;
    if (kind == Kind::kBytes) {
      const int64_t at = ((group * 8 + own / 4) * kLanes + lane) * 4 + own % 4;
      return codes[static_cast<size_t>(at)] - 128;
    }
    const int64_t at = ((group * 4 + own % 16 / 4) * kLanes + lane) * 4 + own % 4;
    return own < 16 ? codes[static_cast<size_t>(at)] & 15 : codes[static_cast<size_t>(at)] >> 4;
  }

  double scale(int64_t layer, int64_t output, int64_t group, bool is_minimum) const {
    const int64_t strip = (num_layers == 0 ? 0 : layer) * num_strips + output / kLanes;
    const auto at =
        static_cast<size_t>((strip * num_groups + group) * kLanes + output % kLanes);
    if (has_halves) return from_half((is_minimum ? half_minimums : half_scales)[at]);
    return (is_minimum ? minimums : scales)[at];
  }

  static Matrix make(Random& random, Kind kind, bool has_halves, int64_t num_strips,
                     int64_t num_groups, int64_t num_layers) {
    Matrix made{};
    made.kind = kind;
    made.num_strips = num_strips;
    made.num_groups = num_groups;
    made.num_layers = num_layers;
    made.has_halves = has_halves;
    const int64_t groups = std::max<int64_t>(num_layers, 1) * num_strips * num_groups;
    if (kind == Kind::kBfloat16) {
      made.floats.resize(static_cast<size_t>(groups * kGroup * kLanes));
      for (uint16_t& value : made.floats) value = to_bfloat16(random.normal());
      return made;
    }
    made.codes.resize(static_cast<size_t>(groups * (kind == Kind::kNibbles ? 4 : 8) * 64));
    for (uint8_t& code : made.codes) code = static_cast<uint8_t>(random.engine()());
    const auto fill = [&](std::vector<float>& wide, std::vector<Half>& halves) {
      const auto size = static_cast<size_t>(groups * kLanes);
      if (has_halves) {
        halves.resize(size);
        // Of normal numbers between 2^-5 and 2^2, of either sign.
        for (Half& half : halves) {
          const uint64_t drawn = random.engine()();
          half.bits = static_cast<uint16_t>((drawn & 0x83ff) | (10 + drawn / 0x10000 % 7) << 10);
        }
      } else {
        wide.resize(size);
        for (float& scale : wide) scale = random.normal();
      }
    };
    fill(made.scales, made.half_scales);
    if (kind == Kind::kNibbles) fill(made.minimums, made.half_minimums);
    return made;
  }

  void add_to(std::vector<Buffer>& arguments) {
    const auto stacked = [this](std::vector<int64_t> shape) {
      if (num_layers > 0) shape.insert(shape.begin(), num_layers);
      return shape;
    };
    if (kind == Kind::kBfloat16) {
      arguments.push_back(
          view("a matrix's values", floats, stacked({num_strips, num_groups * 16, kLanes, 2})));
      return;
    }
    const int64_t vectors = kind == Kind::kNibbles ? 4 : 8;
    arguments.push_back(
        view("a matrix's values", codes, stacked({num_strips, num_groups, vectors, kLanes, 4})));
    const auto add = [&](const char* name, std::vector<float>& wide, std::vector<Half>& halves) {
      const auto shape = stacked({num_strips, num_groups, kLanes});
      arguments.push_back(has_halves ? view(name, halves, shape) : view(name, wide, shape));
    };
    add("a matrix's scales", scales, half_scales);
    if (kind == Kind::kNibbles) add("a matrix's minimums", minimums, half_minimums);
  }
};

// A sum, and how far from it a right answer may lie.
struct Range {
  double value;
  double slack;
};

// Rows as products take them: integers or numbers, each with how wrong its rounding may be.
struct RoundedRow {
  std::vector<double> values;  // without their scales
  std::vector<double> doubts;
  std::vector<double> scales;  // of groups; 1 for bfloat16
  std::vector<size_t> places;  // of the largest of each group of integers, which is not rounded
  std::vector<double> largest;
};

struct Case {
  int64_t num_rows, num_used, num_inputs, num_layers;
  Kind kind;
  bool has_count, has_wanted, has_norm, has_residual;
  int32_t gate;  // -1: none, 0: silu, 1: gelu
  float epsilon;
  // Whether the bodies take the largest of a group, and products with minimums, as bfloat16.
  bool dots_pairs;
  std::vector<int32_t> layer, count;
  std::vector<uint8_t> wanted;
  std::vector<float> x, norm, residual, out;
  bool is_norm_stacked;
  std::vector<Matrix> matrices;

  int64_t num_outputs() const {
    if (gate >= 0) return matrices[0].num_outputs();
    int64_t sum = 0;
    for (const Matrix& matrix : matrices) sum += matrix.num_outputs();
    return sum;
  }

  std::string shown() const {
    std::string sizes;
    for (const Matrix& matrix : matrices) sizes += text(" ", matrix.num_outputs());
    return text("product of ", num_used, " of ", num_rows, " rows of ", num_inputs, ", kind ",
                static_cast<int>(kind), ", some wanted ", has_wanted, ", halves ", matrices[0].has_halves, ", outputs", sizes,
                ", layers ", num_layers, ", norm ", has_norm, ", residual ", has_residual,
                ", gate ", gate);
  }

  static Case make(Random& random) {
    Case made{};
    made.kind = random.one_of({Kind::kNibbles, Kind::kBytes, Kind::kBfloat16});
    const double most_macs = random.chance(0.03) ? 2e7 : 1.5e6;
    int64_t num_groups;
    do {
      made.num_rows = random.chance(0.5) ? random.whole(1, 16) : random.any_size(1, 600);
      num_groups = random.any_size(1, 64);
    } while (static_cast<double>(made.num_rows * num_groups) * 512 > most_macs);
    if (random.chance(0.05)) {
      // As many rows or groups as bodies cut into runs.
      const bool has_rows = random.chance(0.5);
      made.num_rows = has_rows ? random.whole(580, 700) : random.whole(48, 110);
      num_groups = has_rows ? random.whole(1, 3) : random.whole(49, 60);
    }
    made.num_inputs = num_groups * kGroup;
    made.num_layers = random.whole(0, 3);
    made.gate = random.one_of({-1, -1, 0, 1});
    const int64_t num_matrices = made.gate >= 0 ? 2 : random.whole(1, 3);
    int64_t strips = 0;
    const double strip_macs = static_cast<double>(made.num_rows * made.num_inputs * kLanes);
    const auto most_strips = static_cast<int64_t>(most_macs / strip_macs / 2);
    for (int64_t i = 0; i < num_matrices; ++i) {
      if (i == 0 || made.gate < 0) {
        strips = random.any_size(1, std::min<int64_t>(std::max<int64_t>(most_strips, 1), 60));
      }
      made.matrices.push_back(Matrix::make(random, made.kind, random.chance(0.5), strips,
                                           num_groups, made.num_layers));
    }
    made.has_count = random.chance(0.3);
    made.num_used = made.has_count ? random.whole(0, made.num_rows) : made.num_rows;
    made.count = {static_cast<int32_t>(made.num_used)};
    made.has_wanted = random.chance(0.3);
    const double share = random.one_of({0.0f, 0.02f, 0.1f, 0.5f, 1.0f});
    for (int64_t row = 0; row < made.num_rows; ++row) made.wanted.push_back(random.chance(share));
    made.layer = {static_cast<int32_t>(random.whole(0, std::max<int64_t>(made.num_layers, 1) - 1))};
    made.has_norm = random.chance(0.4);
    made.has_residual = random.chance(0.4);
    made.epsilon = random.one_of({1e-6f, 1e-5f, 0.1f});
    made.x = random.normals(made.num_rows * made.num_inputs);
    for (int64_t row = 0; row < made.num_rows; ++row) {
      float* own = made.x.data() + row * made.num_inputs;
      // Rows of all sizes, with groups of zeros, and what is not in use may be anything.
      const float size = made.gate >= 0 ? 0.05f : std::pow(10.0f, random.between(-2, 2));
      for (int64_t i = 0; i < made.num_inputs; ++i) own[i] *= size;
      if (random.chance(0.2)) std::fill(own, own + kGroup, random.chance(0.5) ? 0.0f : 1e-38f);
      if (!made.is_computed(row)) std::fill(own, own + made.num_inputs, kNaN);
    }
    made.is_norm_stacked = made.num_layers > 0 && random.chance(0.7);
    made.norm = random.normals((made.is_norm_stacked ? made.num_layers : 1) * made.num_inputs);
    made.residual = random.normals(made.num_rows * made.num_outputs());
    made.out.assign(made.residual.size(), kNaN);
    return made;
  }

  // Rows go by tiles: all of one that has a wanted row.
  bool is_computed(int64_t row) const {
    if (row >= num_used || !has_wanted) return row < num_used;
    const auto begin = wanted.begin() + row / kTileRows * kTileRows;
    const auto end = wanted.begin() + std::min(row / kTileRows * kTileRows + kTileRows, num_used);
    return std::find(begin, end, 1) != end;
  }

  Invocation invocation(const std::string& instructions) {
    Invocation made{PallasiteMultiply, {}, {}, {}};
    made.arguments = {view("x", x, {num_rows, num_inputs}), view("the layer", layer, {})};
    if (has_count) made.arguments.push_back(view("the count", count, {}));
    if (has_wanted) {
      made.arguments.push_back(view("the wanted rows", wanted, {num_rows}));
      made.arguments.back().type = XLA_FFI_DataType_PRED;
    }
    if (has_norm) {
      made.arguments.push_back(view("the norm", norm,
                                    is_norm_stacked ? std::vector{num_layers, num_inputs}
                                                    : std::vector{num_inputs}));
    }
    if (has_residual) {
      made.arguments.push_back(view("the residual", residual, {num_rows, num_outputs()}));
    }
    for (Matrix& matrix : matrices) matrix.add_to(made.arguments);
    made.results = {view("the outputs", out, {num_rows, num_outputs()})};
    made.attributes = {{"instructions", instructions}, {"has_count", has_count},
                       {"has_wanted", has_wanted},     {"has_norm", has_norm},
                       {"has_residual", has_residual}, {"gate", gate},
                       {"epsilon", epsilon}};
    return made;
  }

  RoundedRow round(int64_t row) const {
    const auto size = static_cast<size_t>(num_inputs);
    RoundedRow made{std::vector<double>(size), std::vector<double>(size),
                    std::vector<double>(size / kGroup, 1.0), {}, {}};
    const float* own = x.data() + row * num_inputs;
    std::vector<double> normed(own, own + num_inputs);
    if (has_norm) {
      double squares = 0;
      for (const double value : normed) squares += value * value;
      const double factor = 1 / std::sqrt(squares / static_cast<double>(num_inputs) + epsilon);
      const float* scale = norm.data() + (is_norm_stacked ? layer[0] * num_inputs : 0);
      for (size_t i = 0; i < size; ++i) normed[i] *= factor * scale[i];
    }
    for (size_t group = 0; group < size / kGroup; ++group) {
      if (kind != Kind::kBfloat16) {
        size_t place = group * kGroup;
        for (size_t i = place; i < (group + 1) * kGroup; ++i) {
          if (std::abs(normed[i]) > std::abs(normed[place])) place = i;
        }
        const double kept =
            dots_pairs ? from_bfloat16(to_bfloat16(static_cast<float>(normed[place]))) : normed[place];
        made.places.push_back(place);
        made.largest.push_back(kept);
        normed[place] -= kept;
      }
      double most = 0;
      for (size_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
        most = std::max(most, std::abs(normed[i]));
      }
      if (kind != Kind::kBfloat16) made.scales[group] = most / 127 < 0x1p-126 ? 0 : most / 127;
      for (size_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
        double step = made.scales[group];
        if (step == 0 || normed[i] == 0) continue;
        if (kind == Kind::kBfloat16) step = std::ldexp(1.0, std::ilogb(normed[i]) - 7);
        const double steps = normed[i] / step;
        made.values[i] = std::nearbyint(steps);
        made.doubts[i] = std::abs(std::abs(steps - std::trunc(steps)) - 0.5) < kNearTie;
        if (kind == Kind::kBfloat16) {
          made.values[i] *= step;
          made.doubts[i] *= step;
        }
      }
    }
    return made;
  }

  Range multiply(const Matrix& matrix, const RoundedRow& row, int64_t output) const {
    double sum = 0, size = 0, slack = 0;
    for (int64_t group = 0; group < matrix.num_groups; ++group) {
      double dot = 0, dot_size = 0, doubt = 0, total = 0, total_doubt = 0;
      for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
        const auto at = static_cast<size_t>(i);
        const double weight = matrix.weight(layer[0], output, i);
        dot += weight * row.values[at];
        dot_size += std::abs(weight * row.values[at]);
        doubt += std::abs(weight) * row.doubts[at];
        total += row.values[at];
        total_doubt += row.doubts[at];
      }
      if (kind == Kind::kBfloat16) {
        sum += dot;
        size += dot_size;
        slack += doubt;
        continue;
      }
      const auto index = static_cast<size_t>(group);
      const double own = row.scales[index], kept = row.largest[index];
      const double scale = matrix.scale(layer[0], output, group, false);
      const double weight =
          matrix.weight(layer[0], output, static_cast<int64_t>(row.places[index]));
      sum += scale * (own * dot + kept * weight);
      size += std::abs(scale) * (std::abs(own * dot) + std::abs(kept * weight));
      slack += std::abs(scale * own) * doubt;
      if (kind == Kind::kNibbles) {
        const double minimum = matrix.scale(layer[0], output, group, true);
        sum += minimum * (own * total + kept);
        size += std::abs(minimum) * (std::abs(own * total) + std::abs(kept));
        slack += std::abs(minimum * own) * total_doubt;
        if (dots_pairs) {
          // The codes' middle is exact in f32. The rest of the minimum, by an inverse of 14 bits, has
          // eight; so has the sum that it is multiplied with.
          size += 8 * std::abs(scale) * (std::abs(own * total) + std::abs(kept));
          // The largest is divided by up to 2^28, and what is below the normal numbers then is zero.
          slack += 15 * 0x1p-98 * std::abs(scale);
          slack += 1.05 * std::abs(own * total + kept) *
                   (0x1p-7 * std::abs(minimum + 8 * scale) + 0x1p-14 * std::abs(minimum));
        }
      }
    }
    // Every addition is of f32; a norm's own sum shows in all of a row. Some instructions take
    // numbers below the normal ones for zeros.
    const double additions =
        static_cast<double>(kind == Kind::kBfloat16 ? num_inputs + 4 : 2 * matrix.num_groups + 8);
    const double normed = has_norm ? static_cast<double>(num_inputs) / 16 + 8 : 0;
    return {sum, slack + (additions + normed) * kUnit * size + 1e-35};
  }

  Range gated(const Range& g, const Range& u) const {
    const double value = g.value;
    const double active =
        gate == 0 ? value / (1 + std::exp(-value))
                  : 0.5 * value *
                        (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * std::pow(value, 3))));
    const double out = active * u.value;
    // Neither gate is steeper than 1.13.
    return {out, 1.13 * g.slack * (std::abs(u.value) + u.slack) + std::abs(active) * u.slack +
                     2e-6 * std::abs(out) + 1e-6 * std::abs(u.value)};
  }

  void check_row(int64_t row) const {
    const float* own = out.data() + row * num_outputs();
    if (!is_computed(row)) {
      for (int64_t i = 0; i < num_outputs(); ++i) {
        // As it was made.
        if (!std::isnan(own[i])) throw Wrong(text("row ", row, " is not wanted, but has ", own[i]));
      }
      return;
    }
    const RoundedRow rounded = round(row);
    int64_t first = 0;
    for (size_t index = 0; index < (gate >= 0 ? 1 : matrices.size()); ++index) {
      for (int64_t i = 0; i < matrices[index].num_outputs(); ++i) {
        Range wanted = multiply(matrices[index], rounded, i);
        if (gate >= 0) wanted = gated(wanted, multiply(matrices[1], rounded, i));
        const int64_t at = first + i;
        if (has_residual) {
          const double added = residual[static_cast<size_t>(row * num_outputs() + at)];
          wanted.value += added;
          wanted.slack += 2 * kUnit * (std::abs(added) + std::abs(wanted.value));
        }
        // Written so that a NaN is wrong.
        if (!(std::abs(own[at] - wanted.value) <= wanted.slack)) {
          throw Wrong(text("row ", row, " has ", own[at], " as output ", at, " and not ",
                           wanted.value, " by ", wanted.slack));
        }
      }
      first += matrices[index].num_outputs();
    }
  }
};

}  // namespace

std::string check_product(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  made.dots_pairs = instructions == "avx512-vnni";
  const std::string error = call(made.invocation(instructions), pool);
  if (!error.empty()) throw Wrong(made.shown() + ": " + error);
  try {
    for (int64_t row = 0; row < made.num_rows; ++row) made.check_row(row);
  } catch (const Wrong& wrong) {
    throw Wrong(made.shown() + ": " + wrong.what());
  }
  return made.shown();
}

int refuse_products(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  // With all that there may be, so that all of it can be wrong.
  made.has_count = made.has_wanted = made.has_norm = made.has_residual = true;
  Faults faults([&] { return made.invocation(instructions); }, random, pool);
  const auto change_attribute = [](const std::string& name, const Attribute& value) {
    return [=](Invocation& invocation) { invocation.attributes[name] = value; };
  };
  const auto reshape = [](const std::string& name, std::vector<int64_t> shape) {
    return [=](Invocation& invocation) {
      for (auto* buffers : {&invocation.arguments, &invocation.results}) {
        for (Buffer& buffer : *buffers) {
          if (buffer.name == name) buffer.shape = shape;
        }
      }
    };
  };
  const int64_t rows = made.num_rows, inputs = made.num_inputs;
  const int32_t more = static_cast<int32_t>(rows) + 1;
  faults.refuse_each();
  faults.refuse_numbers("got -1 rows in use", "the count", 0, {-1});
  faults.refuse_numbers(text("got ", more, " rows in use of ", rows), "the count", 0, {more});
  if (made.num_layers > 0) {
    for (const int32_t layer : {-1, static_cast<int32_t>(made.num_layers), 1 << 30}) {
      faults.refuse_numbers(text("got layer ", layer, " of ", made.num_layers), "the layer", 0,
                            {layer});
    }
  }
  faults.refuse("got a program for a processor with none", change_attribute("instructions", "none"));
  faults.refuse("got x [", reshape("x", {rows * inputs}));
  faults.refuse("got the wanted rows [", reshape("the wanted rows", {rows + 1}));
  faults.refuse("got a norm [", reshape("the norm", {inputs, 1}));
  faults.refuse("got the residual [", reshape("the residual", {rows, made.num_outputs() + 1}));
  faults.refuse("got the outputs [", reshape("the outputs", {rows + 1, made.num_outputs()}));
  faults.refuse("got outputs [", reshape("the outputs", {rows * made.num_outputs()}));
  faults.refuse("got a matrix's values [", reshape("a matrix's values", {1, 1, 1}));
  if (made.kind != Kind::kBfloat16) {
    faults.refuse("got a matrix's scales [", reshape("a matrix's scales", {kLanes}));
  }
  faults.survive(40);
  return faults.num_refused();
}

}  // namespace check
