// Paged attention as XLA sees it: a custom call that writes the new rows into the cache where it
// lies, and hands requests, key heads and tiles of queries to a team of threads.

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "bindings.h"

namespace pallasite {
namespace {

// Rows of queries, a token's heads each, that a thread attends at once.
constexpr int64_t kPromptRows = 96;
// The fewest keys that are worth a thread of their own.
constexpr int64_t kPartKeys = 64;

struct Layout {
  int64_t num_rows;  // B
  int64_t num_tokens;
  int64_t num_requests;
  int64_t page_bytes;
  bool has_like_next;  // whether there is a next layer, of the same window
};

// Raises by its result where the batch contradicts itself or leaves the cache.
std::string find_fault(const Attention& a, const Layout& layout) {
  const int64_t page_size = a.cache.page_size;
  int64_t begin = 0;
  for (int64_t request = 0; request < layout.num_requests; ++request) {
    const int64_t first = a.query_starts[request], end = a.query_starts[request + 1];
    const int64_t length = a.kv_lens[request];
    const std::string name = "request " + std::to_string(request);
    if (first != begin || end < first || end > layout.num_tokens) {
      return "got tokens " + std::to_string(first) + " to " + std::to_string(end) + " for " + name +
             "; they must follow the last request's";
    }
    begin = end;
    if (length < 0 || length > a.pages_per_request * page_size) {
      return "got " + std::to_string(length) + " cached tokens for " + name + "; its pages hold " +
             std::to_string(a.pages_per_request * page_size);
    }
    for (int64_t token = first; token < end; ++token) {
      if (a.positions[token] < 0 || a.positions[token] >= length) {
        return "got position " + std::to_string(a.positions[token]) + " of " + name + ", of " +
               std::to_string(length) + " tokens";
      }
    }
    const int32_t* pages = a.page_table + request * a.pages_per_request;
    for (int64_t page = 0; page * page_size < length; ++page) {
      if (pages[page] < 0 || pages[page] >= a.cache.num_pages) {
        return "got page " + std::to_string(pages[page]) + " of " + name + "; the cache has " +
               std::to_string(a.cache.num_pages);
      }
    }
  }
  return "";
}

// The first key that a query at this position sees, of a whole page's.
int64_t first_key(const Attention& a, int64_t position) {
  const int64_t oldest = a.window > 0 ? std::max<int64_t>(position - a.window + 1, 0) : 0;
  return oldest / kLanes * kLanes;
}

struct Split {
  int64_t token;
  int64_t first_part;
  int64_t num_parts;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Split> splits;
  int64_t num_parts = 0;
  int64_t most_rows = 0;      // of a task's key head
  int64_t most_kv_heads = 1;  // of a task
};

// One query: all key heads at once, since a page has them side by side. Where there are fewer
// requests than threads would need, its keys are cut into parts.
void plan_query(const Attention& a, int64_t request, int64_t wanted_parts, int64_t num_threads,
                Plan& plan) {
  const int64_t token = a.query_starts[request];
  const int64_t first = first_key(a, a.positions[token]), end = a.positions[token] + 1;
  const int64_t num_strips = (end - first + kLanes - 1) / kLanes;
  int64_t num_parts = std::max<int64_t>(std::min(wanted_parts, num_strips * kLanes / kPartKeys), 1);
  // One request's parts are for all threads alike.
  if (wanted_parts > num_threads && num_parts > num_threads) num_parts -= num_parts % num_threads;
  plan.most_rows = std::max(plan.most_rows, a.num_heads / a.cache.num_kv_heads);
  plan.most_kv_heads = a.cache.num_kv_heads;
  if (num_parts > 1) plan.splits.push_back({token, plan.num_parts, num_parts});
  for (int64_t part = 0; part < num_parts; ++part) {
    Task task{};
    task.request = static_cast<int32_t>(request);
    task.num_kv_heads = static_cast<int32_t>(a.cache.num_kv_heads);
    task.first_token = static_cast<int32_t>(token);
    task.num_tokens = 1;
    task.key_begin = static_cast<int32_t>(first + num_strips * part / num_parts * kLanes);
    task.key_end = static_cast<int32_t>(
        std::min(first + num_strips * (part + 1) / num_parts * kLanes, end));
    task.has_sinks = part == 0;
    task.part_index = num_parts > 1 ? static_cast<int32_t>(plan.num_parts++) : -1;
    plan.tasks.push_back(task);
  }
}

// Several queries: tiles of them, and each key head alone.
void plan_prompt(const Attention& a, int64_t request, Plan& plan) {
  const int64_t begin = a.query_starts[request], end = a.query_starts[request + 1];
  const int64_t group = a.num_heads / a.cache.num_kv_heads;
  const int64_t tile = std::max<int64_t>(kPromptRows / group, 1);
  for (int64_t token = begin; token < end; token += tile) {
    const int64_t count = std::min(tile, end - token);
    plan.most_rows = std::max(plan.most_rows, count * group);
    for (int64_t kv_head = 0; kv_head < a.cache.num_kv_heads; ++kv_head) {
      Task task{};
      task.request = static_cast<int32_t>(request);
      task.first_kv_head = static_cast<int32_t>(kv_head);
      task.num_kv_heads = 1;
      task.first_token = static_cast<int32_t>(token);
      task.num_tokens = static_cast<int32_t>(count);
      task.key_begin = static_cast<int32_t>(first_key(a, a.positions[token]));
      task.key_end = a.positions[token + count - 1] + 1;
      task.has_sinks = true;
      task.part_index = -1;
      plan.tasks.push_back(task);
    }
  }
}

Plan make_plan(const Attention& a, const Layout& layout, int64_t num_threads) {
  Plan plan;
  const int64_t wanted_parts =
      num_threads == 1 ? 1 : (2 * num_threads + layout.num_requests - 1) / layout.num_requests;
  for (int64_t request = 0; request < layout.num_requests; ++request) {
    const int64_t count = a.query_starts[request + 1] - a.query_starts[request];
    if (count == 1) plan_query(a, request, wanted_parts, num_threads, plan);
    if (count > 1) plan_prompt(a, request, plan);
  }
  return plan;
}

// Writes the rows of requests with several queries. One query's are its own task's.
void write_prompts(Call& call, const Bodies& bodies, const Attention& a, const Layout& layout) {
  constexpr int64_t kTokens = 32;
  // A token belongs to a request: pieces of requests are handed out.
  std::vector<std::pair<int64_t, int64_t>> pieces;
  for (int64_t request = 0; request < layout.num_requests; ++request) {
    const int64_t begin = a.query_starts[request], end = a.query_starts[request + 1];
    if (end - begin == 1) continue;
    for (int64_t token = begin; token < end; token += kTokens) pieces.emplace_back(request, token);
  }
  const auto write = [&](int64_t piece) {
    const auto [request, token] = pieces[static_cast<size_t>(piece)];
    const int64_t end = std::min<int64_t>(token + kTokens, a.query_starts[request + 1]);
    bodies.write_rows(a, request, token, end);
  };
  call.run(static_cast<int64_t>(pieces.size()), write);
}

// Says which pages these queries will read in the next layer, for products until then to fetch, where
// they have rows enough to do so and not too many.
void expect_next_layer(Call& call, const Bodies& bodies, const Attention& a, const Layout& layout,
                       const Plan& plan) {
  const Cache& cache = a.cache;
  const int64_t num_rows = a.query_starts[layout.num_requests];
  const bool is_worth_it = bodies.fetches && layout.has_like_next &&
                           layout.num_requests >= kFewestFetchingRows && num_rows < kFewestPairedRows;
  const int64_t num_tasks = is_worth_it ? static_cast<int64_t>(plan.tasks.size()) : 0;
  const std::byte* const next_layer = cache.values + cache.num_pages * layout.page_bytes;
  call.expect(num_tasks, layout.page_bytes, [&](int64_t index, const auto& add) {
    const Task& task = plan.tasks[static_cast<size_t>(index)];
    const int32_t* pages = a.page_table + task.request * a.pages_per_request;
    const int64_t begin = task.key_begin / cache.page_size;
    const int64_t end = task.num_tokens > 1 ? begin : (task.key_end - 1) / cache.page_size + 1;
    for (int64_t page = begin; page < end; ++page) {
      add(next_layer + pages[page] * layout.page_bytes);
    }
  });
}

void run_attention(Call& call, const Bodies& bodies, const Attention& a, const Layout& layout) {
  const int64_t width = a.cache.head_width;
  if (layout.num_requests == 0) return;
  write_prompts(call, bodies, a, layout);
  Plan plan = make_plan(a, layout, call.num_threads());
  const int64_t part_size = a.num_heads * (2 + width);
  const size_t scratch_size =
      (bodies.attend_scratch(a, plan.most_rows, plan.most_kv_heads) + 63) / 64 * 64;
  const size_t parts_size =
      (static_cast<size_t>(plan.num_parts * part_size) * sizeof(float) + 63) / 64 * 64;
  // A thread works on one task at a time, so as many scratches as threads are enough.
  const int64_t num_threads = call.num_threads();
  std::byte* const memory =
      call.reserve(parts_size + scratch_size * static_cast<size_t>(num_threads));
  float* const parts = reinterpret_cast<float*>(memory);
  for (Task& task : plan.tasks) {
    if (task.part_index >= 0) task.part = parts + task.part_index * part_size;
  }
  std::vector<std::atomic<bool>> is_taken(static_cast<size_t>(num_threads));
  call.run(static_cast<int64_t>(plan.tasks.size()), [&](int64_t index) {
    size_t own = 0;
    while (is_taken[own].exchange(true, std::memory_order_acquire)) {
      own = (own + 1) % is_taken.size();
    }
    const Task* task = &plan.tasks[static_cast<size_t>(index)];
    const Task* next = task == &plan.tasks.back() ? nullptr : task + 1;
    // A request's only query sees its own row; of parts of its keys, only the last has it.
    const int32_t* starts = a.query_starts + task->request;
    if (starts[1] - starts[0] == 1 && task->key_end == a.positions[task->first_token] + 1) {
      bodies.write_rows(a, task->request, task->first_token, task->first_token + 1);
    }
    bodies.attend(a, *task, next, memory + parts_size + own * scratch_size);
    is_taken[own].store(false, std::memory_order_release);
  });
  expect_next_layer(call, bodies, a, layout, plan);
  for (const Split& split : plan.splits) {
    bodies.merge(a, split.token, parts + split.first_part * part_size, split.num_parts);
  }
}

std::string shapes_fault(const Attention& a) {
  const Cache& cache = a.cache;
  if (cache.head_width % kLanes != 0 || cache.page_size % kLanes != 0 || cache.head_width == 0 ||
      cache.page_size == 0) {
    return "got heads of " + std::to_string(cache.head_width) + " in pages of " +
           std::to_string(cache.page_size) + "; 16 must divide both, and neither be 0";
  }
  if (cache.num_kv_heads == 0 || a.num_heads % cache.num_kv_heads != 0) {
    return "got " + std::to_string(a.num_heads) + " query heads over " +
           std::to_string(cache.num_kv_heads) + " key heads; not a multiple";
  }
  return "";
}

ffi::Error attend(ffi::ThreadPool pool, ffi::RemainingArgs remaining, ffi::RemainingRets results,
                  std::string_view instructions, bool has_rope, bool has_windows, bool has_sinks, float scale, float soft_cap) try {
  const Bodies* bodies = choose(instructions).bodies;
  if (bodies == nullptr) {
    return invalid("got a program for a processor with " + std::string(instructions) +
                   "; this one lacks it; compile the program here");
  }
  Arguments args(remaining);
  Attention a{};
  const ffi::AnyBuffer heads = args.take("the heads", {Type::F32});
  const ffi::AnyBuffer values = args.take("the cache", {Type::F32, Type::U16, Type::S8});
  if (!args.error().empty()) return invalid(args.error());
  const auto shape = values.dimensions();
  if (heads.dimensions().size() != 3 || shape.size() != 6 || shape[3] != 2) {
    return invalid("got heads " + shown(heads.dimensions()) + " and a cache " + shown(shape) +
                   "; they must be [T, N + 2 K, H] and [L, P, K, 2, page, H]");
  }
  Layout layout{};
  layout.num_tokens = heads.dimensions()[0];
  Cache& cache = a.cache;
  const int64_t num_layers = shape[0];
  cache.num_pages = shape[1];
  cache.num_kv_heads = shape[2];
  cache.page_size = shape[4];
  cache.head_width = shape[5];
  const Type type = values.element_type();
  cache.type = type == Type::F32   ? CacheType::kFloat32
               : type == Type::U16 ? CacheType::kBfloat16
                                   : CacheType::kInt8;
  const int64_t rows = cache.num_pages * cache.num_kv_heads * 2 * cache.page_size;
  float* scales = nullptr;
  if (type == Type::S8) {
    scales = const_cast<float*>(data<float>(args.take(
        "the cache's scales", {Type::F32},
        {num_layers, cache.num_pages, cache.num_kv_heads, 2, cache.page_size})));
  }
  const ffi::AnyBuffer layer_buffer = args.take("the layer", {Type::S32}, {});
  const ffi::AnyBuffer positions =
      args.take("positions", {Type::S32}, {layout.num_tokens});
  const ffi::AnyBuffer kv_lens = args.take("kv_lens", {Type::S32});
  if (!args.error().empty()) return invalid(args.error());
  layout.num_rows = static_cast<int64_t>(kv_lens.element_count());
  const ffi::AnyBuffer query_starts =
      args.take("query_starts", {Type::S32}, {layout.num_rows + 1});
  const ffi::AnyBuffer page_table = args.take("the page table", {Type::S32});
  const ffi::AnyBuffer num_requests = args.take("num_requests", {Type::S32}, {});
  if (!args.error().empty()) return invalid(args.error());
  if (page_table.dimensions().size() != 2 || page_table.dimensions()[0] != layout.num_rows) {
    return invalid("got a page table " + shown(page_table.dimensions()) + " for " +
                   std::to_string(layout.num_rows) + " rows of requests; it must be [B, M]");
  }
  const int64_t layer = *data<int32_t>(layer_buffer);
  if (layer < 0 || layer >= num_layers) {
    return invalid("got layer " + std::to_string(layer) + " of " + std::to_string(num_layers));
  }
  layout.has_like_next = layer + 1 < num_layers;
  if (has_windows) {
    const ffi::AnyBuffer windows = args.take("windows", {Type::S32}, {num_layers});
    if (args.error().empty()) {
      const int32_t* own = data<int32_t>(windows) + layer;
      a.window = own[0];
      layout.has_like_next = layout.has_like_next && own[1] == own[0];
    }
  }
  if (!args.error().empty()) return invalid(args.error());
  if (has_rope) {
    const ffi::AnyBuffer cosines = args.take("cosines", {Type::F32});
    if (args.error().empty() && cosines.dimensions().size() == 2) {
      a.num_pairs = cosines.dimensions()[1];
    }
    const ffi::AnyBuffer sines =
        args.take("sines", {Type::F32}, {layout.num_tokens, a.num_pairs});
    if (a.num_pairs % kLanes != 0 || 2 * a.num_pairs > cache.head_width ||
        cosines.element_count() != sines.element_count()) {
      args.fail("got cosines " + shown(cosines.dimensions()) + " for heads of " +
                std::to_string(cache.head_width) + "; they must be [T, pairs], of whole 16 pairs");
    }
    if (!args.error().empty()) return invalid(args.error());
    a.cosines = data<float>(cosines);
    a.sines = data<float>(sines);
  }
  a.num_heads = heads.dimensions()[1] - 2 * cache.num_kv_heads;
  if (a.num_heads < 1 || heads.dimensions()[2] != cache.head_width) {
    return invalid("got heads " + shown(heads.dimensions()) + " for a cache " + shown(shape));
  }
  if (has_sinks) a.sinks = data<float>(args.take("sinks", {Type::F32}, {a.num_heads}));
  if (!args.error().empty()) return invalid(args.error());
  if (const std::string fault = shapes_fault(a); !fault.empty()) return invalid(fault);
  auto out = results.get<ffi::AnyBuffer>(0);
  auto written = results.get<ffi::AnyBuffer>(1);
  if (out.has_error() || written.has_error()) return invalid("got too few results");
  args.fail(buffer_fault("the outputs", **out, {Type::F32},
                       {layout.num_tokens, a.num_heads, cache.head_width}));
  args.fail(buffer_fault("the cache", **written, {type}, {shape.begin(), shape.end()}));
  if (!args.error().empty()) return invalid(args.error());
  if ((*written)->untyped_data() != values.untyped_data()) {
    return invalid("got a cache to be read that is not the one to be written; they must be one");
  }
  const int64_t item = static_cast<int64_t>(ffi::ByteWidth(type));
  layout.page_bytes = cache.num_kv_heads * 2 * cache.page_size * cache.head_width * item;
  cache.values = static_cast<std::byte*>((*written)->untyped_data()) +
                 layer * cache.num_pages * layout.page_bytes;
  if (scales != nullptr) {
    auto written_scales = results.get<ffi::AnyBuffer>(2);
    if (written_scales.has_error() || (*written_scales)->untyped_data() != scales) {
      return invalid("got scales to be read that are not those to be written");
    }
    cache.scales = scales + layer * rows;
  }
  // A token's queries, then its keys, then its values.
  a.q = data<float>(heads);
  a.k_new = a.q + a.num_heads * cache.head_width;
  a.v_new = a.k_new + cache.num_kv_heads * cache.head_width;
  a.stride = heads.dimensions()[1] * cache.head_width;
  a.out = static_cast<float*>((*out)->untyped_data());
  a.positions = data<int32_t>(positions);
  a.kv_lens = data<int32_t>(kv_lens);
  a.query_starts = data<int32_t>(query_starts);
  a.page_table = data<int32_t>(page_table);
  a.pages_per_request = page_table.dimensions()[1];
  a.scale = scale;
  a.soft_cap = soft_cap;
  layout.num_requests = *data<int32_t>(num_requests);
  if (layout.num_requests < 0 || layout.num_requests > layout.num_rows) {
    return invalid("got " + std::to_string(layout.num_requests) + " requests in " +
                   std::to_string(layout.num_rows) + " rows");
  }
  if (const std::string fault = find_fault(a, layout); !fault.empty()) return invalid(fault);
  Call call(pool);
  run_attention(call, *bodies, a, layout);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "got no memory for attention");
}

}  // namespace
}  // namespace pallasite

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasiteAttend, pallasite::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("instructions")
                                  .Attr<bool>("has_rope")
                                  .Attr<bool>("has_windows")
                                  .Attr<bool>("has_sinks")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));
