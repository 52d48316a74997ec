// A team of threads that work through one operation: the one that XLA calls, and others of the pool
// that XLA hands over.
//
// A decode step is some hundred operations of ten microseconds each, and waking a sleeping thread
// takes as long. So a helper that has finished lingers for a while, spinning, and joins the next
// operation within a tenth of a microsecond. Nothing ever waits for a helper to come: what no helper
// takes, the caller does itself.

#ifndef PALLASITE_TEAM_H_
#define PALLASITE_TEAM_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "bodies.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pallasite {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Memory that is kept between operations, so that none is allocated in a step.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Returns `size` bytes on a line of their own. What was there before is lost.
  std::byte* reserve(size_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t rounded = (size + 4095) / 4096 * 4096;
      data_ = static_cast<std::byte*>(std::aligned_alloc(4096, rounded));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
#if defined(__SANITIZE_ADDRESS__)
    // What lies behind is nobody's, though a larger operation may have had it.
    ASAN_UNPOISON_MEMORY_REGION(data_, size);
    ASAN_POISON_MEMORY_REGION(data_ + size, size_ - size);
#endif
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

class Team {
 public:
  Scratch scratch;

  // Calls work(0) to work(num_chunks - 1), each once, in this thread and in up to `num_helpers`
  // others; returns when all are done. `schedule` hands a callable to a thread of the pool.
  //
  // Chunks are cut into a run for each thread, which takes its own in order, so that what lies one
  // after another in memory is read by one thread; who has done with its run helps with the next.
  template <typename Schedule, typename Work>
  void run(int64_t num_chunks, int64_t num_helpers, const Schedule& schedule, const Work& work) {
    if (num_chunks <= 0) return;
    if (num_helpers <= 0 || num_chunks == 1) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) work(chunk);
      return;
    }
    call_ = [](const void* self, int64_t chunk) { (*static_cast<const Work*>(self))(chunk); };
    work_ = &work;
    const int64_t wanted = std::min({num_helpers, num_chunks - 1, kMostRuns - 1});
    num_runs_ = wanted + 1;
    for (int64_t run = 0; run < num_runs_; ++run) {
      runs_[run].next.store(num_chunks * run / num_runs_, std::memory_order_relaxed);
      runs_[run].end = num_chunks * (run + 1) / num_runs_;
    }
    const uint64_t generation = (state_.load(std::memory_order_relaxed) & ~kLow) + kGeneration;
    state_.store(generation | kOpen, std::memory_order_release);
    while (present_.load(std::memory_order_relaxed) < wanted) {
      present_.fetch_add(1, std::memory_order_relaxed);
      schedule([this] { help(); });
    }
    take_chunks(0);
    // Nobody joins any more; those who have are waited for.
    uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int64_t spins = 0; (state & kActive) != 0; ++spins) {
      if (spins < kSpinsBeforeYield) {
        pause_thread();
      } else {
        std::this_thread::yield();
      }
      state = state_.load(std::memory_order_acquire);
    }
  }

  // Says what the chunks of a later operation will read, which `num_threads` will work on: pages of
  // `page_size` bytes, a multiple of kFetched. each(chunk, add) calls add(page) for those of a chunk,
  // in order. What was said before is forgotten. Not while an operation runs.
  template <typename Each>
  void expect(int64_t num_chunks, int64_t num_threads, int64_t page_size, const Each& each) {
    num_expecting_ = 0;
    page_size_ = page_size;
    pages_.clear();
    const int64_t num_runs = std::min({num_threads, num_chunks, kMostRuns});
    for (int64_t run = 0; run < num_runs; ++run) {
      const auto first = static_cast<int64_t>(pages_.size());
      const auto most = static_cast<size_t>(first + kMostExpected / page_size);
      for (int64_t chunk = num_chunks * run / num_runs; chunk < num_chunks * (run + 1) / num_runs;
           ++chunk) {
        each(chunk, [&](const std::byte* page) {
          if (pages_.size() < most) pages_.push_back(page);
        });
      }
      const int64_t units = page_size / kFetched;
      runs_[run].next_unit.store(first * units, std::memory_order_relaxed);
      runs_[run].end_unit = static_cast<int64_t>(pages_.size()) * units;
    }
    num_expecting_ = num_runs;
  }

  // Takes what the run that this chunk is of, in order, is expected to read: of units that nobody has
  // taken `count` at most. Of more than two threads, one may have another run than the last time.
  Upcoming take_expected(int64_t chunk, int64_t num_chunks, int64_t count) {
    Upcoming upcoming{pages_.data(), page_size_, 0, 0, nullptr, nullptr};
    if (num_expecting_ == 0 || count == 0) return upcoming;
    Run& run = runs_[((chunk + 1) * num_expecting_ - 1) / num_chunks];
    if (run.next_unit.load(std::memory_order_relaxed) >= run.end_unit) return upcoming;
    upcoming.next = run.next_unit.fetch_add(count, std::memory_order_relaxed);
    upcoming.last = std::min(upcoming.next + count, run.end_unit);
    return upcoming;
  }

  // Takes a team that nobody uses, or null where all are taken.
  static Team* take() {
    // Never destroyed: a helper may still linger when the process ends.
    static Team* const teams = new Team[kNumTeams];
    for (Team* team = teams; team != teams + kNumTeams; ++team) {
      if (!team->is_taken_.load(std::memory_order_relaxed) &&
          !team->is_taken_.exchange(true, std::memory_order_acquire)) {
        num_taken().fetch_add(1, std::memory_order_relaxed);
        return team;
      }
    }
    return nullptr;
  }

  void give_back() {
    num_taken().fetch_sub(1, std::memory_order_relaxed);
    is_taken_.store(false, std::memory_order_release);
  }

 private:
  static constexpr uint64_t kActive = 0x7fff;  // how many helpers are at work
  static constexpr uint64_t kOpen = 0x8000;    // whether they may join
  static constexpr uint64_t kLow = 0xffff;
  static constexpr uint64_t kGeneration = 0x10000;
  static constexpr int64_t kSpinsBeforeYield = 4000;
  static constexpr std::chrono::microseconds kLinger{100};
  static constexpr int kNumTeams = 64;
  static constexpr int64_t kMostRuns = 256;

  // Bytes that a thread is expected to read, as far as its caches may hold them.
  static constexpr int64_t kMostExpected = 4 << 20;

  struct alignas(64) Run {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
    std::atomic<int64_t> next_unit{0};
    int64_t end_unit = 0;
  };

  static std::atomic<int>& num_taken() {
    static std::atomic<int> count{0};
    return count;
  }

  void take_chunks(int64_t first) {
    // Read once: others take the line that these are on.
    const auto call = call_;
    const void* const work = work_;
    const int64_t num_runs = num_runs_;
    for (int64_t i = 0; i < num_runs; ++i) {
      Run& run = runs_[(first + i) % num_runs];
      for (;;) {
        const int64_t chunk = run.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= run.end) break;
        call(work, chunk);
      }
    }
  }

  // What a helper does: joins operations until none has come for a while.
  void help() {
    uint64_t last = 0;
    auto since = std::chrono::steady_clock::now();
    for (int spins = 1;; ++spins) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if ((state & kOpen) != 0 && (state & ~kLow) != last) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
          last = state & ~kLow;
          // What it needs first comes from another processor's cache: all at once.
          __builtin_prefetch(work_);
          take_chunks(1 + static_cast<int64_t>(state & kActive));
          state_.fetch_sub(1, std::memory_order_acq_rel);
          since = std::chrono::steady_clock::now();
          spins = 0;
        }
        continue;
      }
      pause_thread();
      if (spins % 32 == 0) {
        // Where several devices share the processor, a thread that spins takes another's turn.
        const bool is_shared = num_taken().load(std::memory_order_relaxed) > 1;
        if (is_shared || std::chrono::steady_clock::now() - since > kLinger) break;
      }
    }
    present_.fetch_sub(1, std::memory_order_relaxed);
  }

  // On one line: who reads that an operation has begun has with it what the operation is.
  alignas(64) std::atomic<uint64_t> state_{0};
  int64_t num_runs_ = 0;
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  alignas(64) std::atomic<int64_t> present_{0};
  std::atomic<bool> is_taken_{false};
  Run runs_[kMostRuns];
  std::vector<const std::byte*> pages_;
  int64_t page_size_ = 0;
  int64_t num_expecting_ = 0;
};

}  // namespace pallasite

#endif  // PALLASITE_TEAM_H_
