#include "support/fixture.h"

#include <time.h>

#include <cstdlib>

#include "common/check.h"

namespace lora_serve::bench {

bool IsSmallest() {
  static const bool is_smallest = std::getenv("LORA_SERVE_BENCH_SMALLEST") != nullptr;
  return is_smallest;
}

// SplitMix64's finalizer.
std::uint64_t Scramble(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

void AppendTokens(Tokens& tokens, std::uint64_t seed, std::int64_t num_tokens) {
  constexpr std::uint64_t kVocabularySize = 128'000;
  const std::uint64_t first = Scramble(seed);
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    const std::uint64_t bits = Scramble(first + static_cast<std::uint64_t>(i)) >> 32;
    tokens.push_back(static_cast<TokenId>((bits * kVocabularySize) >> 32));
  }
}

Tokens RandomTokens(std::uint64_t seed, std::int64_t num_tokens) {
  Tokens tokens;
  tokens.reserve(static_cast<std::size_t>(num_tokens));
  AppendTokens(tokens, seed, num_tokens);
  return tokens;
}

double ThreadCpuSeconds() {
  timespec time{};
  LS_CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

FixtureSlot& CurrentFixture() {
  static FixtureSlot slot;
  return slot;
}

}  // namespace lora_serve::bench
