#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "faults.h"

namespace check {
namespace {

enum class Held { kFloat32, kBfloat16, kInt8 };

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Request {
  int64_t first_token, num_new, length;
};

struct Case {
  int64_t num_tokens, num_layers, num_pages, num_kv_heads, group, page_size, width, pages_per_row;
  Held held;
  bool has_rope, has_windows, has_sinks;
  int64_t num_pairs;
  float scale, soft_cap;
  std::vector<Request> requests;
  std::vector<float> heads, scales, cosines, sines, sinks, out, wide;
  std::vector<uint16_t> halves;
  std::vector<int8_t> bytes;
  std::vector<int32_t> layer, positions, kv_lens, query_starts, page_table, num_requests, windows;

  int64_t num_heads() const { return num_kv_heads * group; }
  int64_t num_rows() const { return static_cast<int64_t>(kv_lens.size()); }
  int64_t cache_rows() const { return num_layers * num_pages * num_kv_heads * 2 * page_size; }

  std::string shown() const {
    std::string all;
    for (const Request& request : requests) all += text(" ", request.num_new, "/", request.length);
    return text("attention of", all, " in ", num_tokens, " tokens, held ", static_cast<int>(held),
                ", K ", num_kv_heads, ", G ", group, ", H ", width, ", page ", page_size,
                ", window ", window(), ", cap ", soft_cap, ", sinks ", has_sinks, ", pairs ",
                has_rope ? num_pairs : 0);
  }

  int64_t window() const { return has_windows ? windows[static_cast<size_t>(layer[0])] : 0; }

  static Case make(Random& random) {
    Case made{};
    made.held = random.one_of({Held::kFloat32, Held::kBfloat16, Held::kInt8});
    made.num_layers = random.whole(1, 3);
    made.num_kv_heads = random.whole(1, 3);
    made.group = random.one_of({1, 1, 2, 3, 4, 8, 13});
    made.page_size = random.one_of({16, 16, 32, 48});
    made.width = random.one_of({16, 32, 48, 64, 64, 80, 128, 256});
    made.num_pairs = 16 * random.whole(0, made.width / 32);
    made.has_rope = random.chance(0.5);
    made.has_windows = random.chance(0.4);
    made.has_sinks = random.chance(0.3);
    made.scale = 1 / std::sqrt(static_cast<float>(made.width));
    made.soft_cap = random.chance(0.3) ? random.between(0.5f, 20) : 0;
    made.layer = {static_cast<int32_t>(random.whole(0, made.num_layers - 1))};
    for (int64_t i = 0; i < made.num_layers; ++i) {
      made.windows.push_back(static_cast<int32_t>(
          random.one_of<int64_t>({0, 1, random.any_size(1, 400), 2147483647})));
    }
    made.make_requests(random);
    made.make_pages(random);
    made.make_cache(random);
    made.heads = random.normals(made.num_tokens * (made.group + 2) * made.num_kv_heads *
                                made.width);
    const auto num_turned = static_cast<size_t>(made.num_tokens * made.num_pairs);
    for (size_t i = 0; i < num_turned; ++i) {
      const float angle = random.between(-3, 3);
      made.cosines.push_back(std::cos(angle));
      made.sines.push_back(std::sin(angle));
    }
    // As large as what is in them, so that nothing behind it is theirs.
    made.cosines.shrink_to_fit();
    made.sines.shrink_to_fit();
    made.sinks = random.normals(made.num_heads());
    made.out.assign(static_cast<size_t>(made.num_tokens * made.num_heads() * made.width), kNaN);
    return made;
  }

  void make_requests(Random& random) {
    const int64_t rows = random.whole(1, 6), count = random.whole(random.chance(0.95), rows);
    const bool has_prompts = random.chance(0.6);
    int64_t total = 0, longest = 1, budget = 40000;  // queries times keys
    kv_lens.assign(static_cast<size_t>(rows), 0);
    query_starts.assign(static_cast<size_t>(rows + 1), 0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t num_new = 1, before = 0;
      if (random.chance(0.1)) {
        num_new = 0;
      } else if (has_prompts && random.chance(0.6)) {
        num_new = random.any_size(2, 220);
      }
      if (random.chance(0.8)) before = random.any_size(1, 900);
      while (num_new * (before + num_new) > budget) {
        num_new = (num_new + 1) / 2;
        before /= 2;
      }
      budget = std::max<int64_t>(budget - num_new * (before + num_new), 1000);
      requests.push_back({total, num_new, before + num_new});
      total += num_new;
      longest = std::max(longest, before + num_new);
      kv_lens[static_cast<size_t>(i)] = static_cast<int32_t>(before + num_new);
      query_starts[static_cast<size_t>(i + 1)] = static_cast<int32_t>(total);
    }
    for (int64_t i = count; i < rows; ++i) {
      query_starts[static_cast<size_t>(i + 1)] = static_cast<int32_t>(total);
    }
    num_requests = {static_cast<int32_t>(count)};
    num_tokens = total + (random.chance(0.5) ? random.whole(0, 5) : 0);
    num_tokens = std::max<int64_t>(num_tokens, 1);
    positions.assign(static_cast<size_t>(num_tokens), -7);
    for (const Request& request : requests) {
      for (int64_t i = 0; i < request.num_new; ++i) {
        positions[static_cast<size_t>(request.first_token + i)] =
            static_cast<int32_t>(request.length - request.num_new + i);
      }
    }
    pages_per_row = (longest + page_size - 1) / page_size + random.whole(0, 2);
  }

  void make_pages(Random& random) {
    int64_t used = 0;
    for (const Request& request : requests) used += (request.length + page_size - 1) / page_size;
    num_pages = used + random.whole(used == 0, 3);
    std::vector<int32_t> free(static_cast<size_t>(num_pages));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random.engine());
    // What lies behind a request's pages is never read.
    page_table.resize(static_cast<size_t>(num_rows() * pages_per_row));
    for (int32_t& page : page_table) page = random.one_of({-1, 1 << 30, 0});
    for (size_t i = 0; i < requests.size(); ++i) {
      for (int64_t page = 0; page * page_size < requests[i].length; ++page) {
        page_table[i * static_cast<size_t>(pages_per_row) + static_cast<size_t>(page)] =
            free.back();
        free.pop_back();
      }
    }
  }

  // What nobody has written is NaN, but in int8, which has none: its scales are.
  void make_cache(Random& random) {
    const auto rows = static_cast<size_t>(cache_rows()), wide_row = static_cast<size_t>(width);
    if (held == Held::kFloat32) wide.assign(rows * wide_row, kNaN);
    if (held == Held::kBfloat16) halves.assign(rows * wide_row, 0x7fc0);
    if (held == Held::kInt8) {
      bytes.assign(rows * wide_row, 77);
      scales.assign(rows, kNaN);
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      for (int64_t key = 0; key < requests[i].length - requests[i].num_new; ++key) {
        for (int64_t head = 0; head < 2 * num_kv_heads; ++head) {
          const auto row = static_cast<size_t>(row_of(i, key, head / 2, head % 2));
          for (size_t at = row * wide_row; at < (row + 1) * wide_row; ++at) {
            if (held == Held::kFloat32) wide[at] = random.normal();
            if (held == Held::kBfloat16) halves[at] = to_bfloat16(random.normal());
            if (held == Held::kInt8) bytes[at] = static_cast<int8_t>(random.engine()() | 1);
          }
          if (held == Held::kInt8) scales[row] = random.between(0, 0.03f);
        }
      }
    }
  }

  // Which row of the cache a key (0) or a value (1) has.
  int64_t row_of(size_t request, int64_t position, int64_t head, int64_t which) const {
    const int64_t page = page_table[request * static_cast<size_t>(pages_per_row) +
                                    static_cast<size_t>(position / page_size)];
    const int64_t block = (layer[0] * num_pages + page) * num_kv_heads + head;
    return (block * 2 + which) * page_size + position % page_size;
  }

  double held_value(int64_t row, int64_t i) const {
    const auto at = static_cast<size_t>(row * width + i);
    if (held == Held::kFloat32) return wide[at];
    if (held == Held::kBfloat16) return from_bfloat16(halves[at]);
    return static_cast<double>(bytes[at]) * scales[static_cast<size_t>(row)];
  }

  Buffer cache_buffer() {
    const std::vector<int64_t> shape = {num_layers, num_pages, num_kv_heads, 2, page_size, width};
    if (held == Held::kFloat32) return view("the cache", wide, shape);
    if (held == Held::kBfloat16) return view("the cache", halves, shape);
    return view("the cache", bytes, shape);
  }

  Invocation invocation(const std::string& instructions) {
    Invocation made{PallasiteAttend, {}, {}, {}};
    auto& all = made.arguments;
    all = {view("the heads", heads, {num_tokens, num_heads() + 2 * num_kv_heads, width}),
           cache_buffer()};
    made.results = {view("the outputs", out, {num_tokens, num_heads(), width}), cache_buffer()};
    if (held == Held::kInt8) {
      const auto held_scales = view("the cache's scales", scales,
                                    {num_layers, num_pages, num_kv_heads, 2, page_size});
      all.push_back(held_scales);
      made.results.push_back(held_scales);
    }
    all.push_back(view("the layer", layer, {}));
    all.push_back(view("positions", positions, {num_tokens}));
    all.push_back(view("kv_lens", kv_lens, {num_rows()}));
    all.push_back(view("query_starts", query_starts, {num_rows() + 1}));
    all.push_back(view("the page table", page_table, {num_rows(), pages_per_row}));
    all.push_back(view("num_requests", num_requests, {}));
    if (has_windows) all.push_back(view("windows", windows, {num_layers}));
    if (has_rope) {
      all.push_back(view("cosines", cosines, {num_tokens, num_pairs}));
      all.push_back(view("sines", sines, {num_tokens, num_pairs}));
    }
    if (has_sinks) all.push_back(view("sinks", sinks, {num_heads()}));
    made.attributes = {{"instructions", instructions}, {"has_rope", has_rope},
                       {"has_windows", has_windows},   {"has_sinks", has_sinks},
                       {"scale", scale},               {"soft_cap", soft_cap}};
    return made;
  }

  // A token's head, of queries, then keys, then values; all but the values are turned.
  std::vector<double> head_of(int64_t token, int64_t head) const {
    const float* x = heads.data() + (token * (num_heads() + 2 * num_kv_heads) + head) * width;
    std::vector<double> made(x, x + width);
    if (!has_rope || head >= num_heads() + num_kv_heads) return made;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const auto at = static_cast<size_t>(token * num_pairs + i);
      const double first = x[i], second = x[num_pairs + i];
      made[static_cast<size_t>(i)] = first * cosines[at] - second * sines[at];
      made[static_cast<size_t>(num_pairs + i)] = second * cosines[at] + first * sines[at];
    }
    return made;
  }

  // Compares what was written with what it was, and all else bit by bit. Returns nothing.
  void check_cache(const Case& before) const {
    std::vector<bool> is_written(static_cast<size_t>(cache_rows()));
    for (size_t i = 0; i < requests.size(); ++i) {
      const Request& request = requests[i];
      for (int64_t token = 0; token < request.num_new; ++token) {
        for (int64_t head = 0; head < 2 * num_kv_heads; ++head) {
          const int64_t position = request.length - request.num_new + token;
          const int64_t row = row_of(i, position, head / 2, head % 2);
          is_written[static_cast<size_t>(row)] = true;
          const int64_t which = num_heads() + head % 2 * num_kv_heads + head / 2;
          check_row(row, head_of(request.first_token + token, which));
        }
      }
    }
    for (size_t row = 0; row < is_written.size(); ++row) {
      if (is_written[row]) continue;
      const auto same = [row](const auto& now, const auto& then, size_t size) {
        return now.empty() ||
               std::memcmp(&now[row * size], &then[row * size], size * sizeof(now[0])) == 0;
      };
      const auto size = static_cast<size_t>(width);
      if (!same(wide, before.wide, size) || !same(halves, before.halves, size) ||
          !same(bytes, before.bytes, size) || !same(scales, before.scales, 1)) {
        throw Wrong(text("row ", row, " of the cache is not this step's, but has changed"));
      }
    }
  }

  void check_row(int64_t row, const std::vector<double>& wanted) const {
    double most = 0;
    for (const double value : wanted) most = std::max(most, std::abs(value));
    for (int64_t i = 0; i < width; ++i) {
      const double value = wanted[static_cast<size_t>(i)];
      double slack = 4e-7 * most;
      if (held == Held::kBfloat16) slack += std::abs(value) / 256;
      if (held == Held::kInt8) slack += most / 254 * 1.0001;
      if (!(std::abs(held_value(row, i) - value) <= slack)) {
        throw Wrong(text("row ", row, " of the cache has ", held_value(row, i), " and not ", value));
      }
    }
  }

  // Attends with the cache as it is now.
  void check_outputs() const {
    double error = 0, allowed = 0;
    std::vector<double> weights, row(static_cast<size_t>(width)), sizes(row.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      const Request& request = requests[i];
      for (int64_t token = 0; token < request.num_new; ++token) {
        const int64_t position = request.length - request.num_new + token;
        const int64_t first = window() > 0 ? std::max<int64_t>(position - window() + 1, 0) : 0;
        for (int64_t head = 0; head < num_heads(); ++head) {
          const double sum = weigh(i, request.first_token + token, head, first, position, weights);
          std::fill(row.begin(), row.end(), 0);
          std::fill(sizes.begin(), sizes.end(), 0);
          for (int64_t key = first; key <= position; ++key) {
            const int64_t at = row_of(i, key, head / group, 1);
            const double weight = weights[static_cast<size_t>(key - first)] / sum;
            for (int64_t j = 0; j < width; ++j) {
              const double some = weight * held_value(at, j);
              row[static_cast<size_t>(j)] += some;
              sizes[static_cast<size_t>(j)] += std::abs(some);
            }
          }
          const float* own =
              out.data() + ((request.first_token + token) * num_heads() + head) * width;
          for (int64_t j = 0; j < width; ++j) {
            const double size = sizes[static_cast<size_t>(j)];
            const double off = std::abs(own[j] - row[static_cast<size_t>(j)]);
            // Weights of a cache of f32 are f32; those of others are rounded to 8 bits, and so were
            // a query's numbers, which make a score.
            const double most = held == Held::kFloat32 ? 2e-5 * (size + 1) : size / 64 + 1e-4;
            if (!(off <= most)) {
              throw Wrong(text("token ", token, " of request ", i, ", head ", head, " has ", own[j],
                               " as ", j, " and not ", row[static_cast<size_t>(j)]));
            }
            error += off * off;
            allowed += size * size;
          }
        }
      }
    }
    // Roundings fall both ways: together they are less than the most that each may be, which is
    // 2^-8 of a weight and as much of a query.
    const double share = held == Held::kFloat32 ? 1e-5 : 1.0 / 256;
    if (!(std::sqrt(error) <= share * std::sqrt(allowed) + 1e-4)) {
      throw Wrong(text("outputs are off by ", std::sqrt(error), " in all, for values of ",
                       std::sqrt(allowed)));
    }
    const int64_t used = requests.empty() ? 0 : query_starts[requests.size()];
    for (auto at = static_cast<size_t>(used * num_heads() * width); at < out.size(); ++at) {
      // As it was made.
      if (!std::isnan(out[at])) throw Wrong("a token that is no request's has an output");
    }
  }

  // Fills the weights of the keys [first, position] of a query; returns their sum, with the sink's.
  double weigh(size_t request, int64_t token, int64_t head, int64_t first, int64_t position,
               std::vector<double>& weights) const {
    std::vector<double> query = head_of(token, head);
    for (double& value : query) {
      value *= scale;
      if (held != Held::kFloat32) value = from_bfloat16(to_bfloat16(static_cast<float>(value)));
    }
    weights.clear();
    double most = has_sinks ? sinks[static_cast<size_t>(head)] : -kInfinity;
    for (int64_t key = first; key <= position; ++key) {
      const int64_t at = row_of(request, key, head / group, 0);
      double score = 0;
      for (int64_t i = 0; i < width; ++i) score += query[static_cast<size_t>(i)] * held_value(at, i);
      if (soft_cap > 0) score = soft_cap * std::tanh(score / soft_cap);
      weights.push_back(score);
      most = std::max(most, score);
    }
    double sum = has_sinks ? std::exp(sinks[static_cast<size_t>(head)] - most) : 0;
    for (double& weight : weights) sum += weight = std::exp(weight - most);
    return sum;
  }
};

}  // namespace

std::string check_attention(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  const Case before = made;
  const std::string error = call(made.invocation(instructions), pool);
  if (!error.empty()) throw Wrong(made.shown() + ": " + error);
  try {
    made.check_cache(before);
    made.check_outputs();
  } catch (const Wrong& wrong) {
    throw Wrong(made.shown() + ": " + wrong.what());
  }
  return made.shown();
}

int refuse_attention(const std::string& instructions, Random& random, Pool& pool) {
  Case made = Case::make(random);
  while (made.requests.empty() || made.requests[0].num_new == 0) made = Case::make(random);
  made.has_windows = made.has_rope = made.has_sinks = true;
  Faults faults([&] { return made.invocation(instructions); }, random, pool);
  faults.refuse_each();
  const auto pages = static_cast<int32_t>(made.num_pages), length = made.kv_lens[0];
  for (const int32_t page : {-1, pages, pages + 1, 1 << 30, -2147483647}) {
    faults.refuse_numbers(text("got page ", page, " of request 0; the cache has ", pages),
                          "the page table", 0, {page});
    const int64_t last = (length - 1) / made.page_size;
    faults.refuse_numbers(text("got page ", page, " of request 0; the cache has ", pages),
                          "the page table", static_cast<size_t>(last), {page});
  }
  const auto layers = static_cast<int32_t>(made.num_layers);
  for (const int32_t layer : {-1, layers, 2147483647}) {
    faults.refuse_numbers(text("got layer ", layer, " of ", layers), "the layer", 0, {layer});
  }
  const auto holds = static_cast<int32_t>(made.pages_per_row * made.page_size);
  for (const int32_t wrong : {-1, holds + 1, 2147483647}) {
    faults.refuse_numbers(text("got ", wrong, " cached tokens for request 0"), "kv_lens", 0,
                          {wrong});
  }
  faults.refuse_numbers(text("got position ", made.positions[0]), "kv_lens", 0,
                        {made.positions[0]});
  for (const int32_t position : {-1, length, 2147483647}) {
    faults.refuse_numbers(text("got position ", position, " of request 0, of ", length),
                          "positions", 0, {position});
  }
  const auto tokens = static_cast<int32_t>(made.num_tokens);
  faults.refuse_numbers("got tokens 1 to", "query_starts", 0, {1});
  faults.refuse_numbers("got tokens 0 to -1 for request 0", "query_starts", 1, {-1});
  faults.refuse_numbers(text("got tokens 0 to ", tokens + 1, " for request 0"), "query_starts", 1,
                        {tokens + 1});
  const auto rows = static_cast<int32_t>(made.num_rows());
  for (const int32_t wrong : {-1, rows + 1}) {
    faults.refuse_numbers(text("got ", wrong, " requests in ", rows, " rows"), "num_requests", 0,
                          {wrong});
  }
  faults.refuse("got a program for a processor with none", [](Invocation& invocation) {
    invocation.attributes["instructions"] = "none";
  });
  faults.refuse("got a cache to be read that is not the one to be written",
                [&](Invocation& invocation) { invocation.results[1].data = made.heads.data(); });
  faults.survive(60);
  return faults.num_refused();
}

}  // namespace check
