#include <gtest/gtest.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "support/random_scheduler_run.h"

// scheduler_replay SEED NUM_STEPS PADDING_BYTES REQUEST_ID_FACTOR
//
// Runs random operations on a scheduler and prints every plan, all arrays of it; without overlap
// for even seeds, with overlap for odd ones. The seed alone decides the calls; the padding gives
// all objects other addresses, the factor gives requests other ids (printed without it), and the
// build may give pages other hashes.

namespace {

std::int64_t ParseNumber(const char* text) {
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), number);
  if (error != std::errc{} || *end != '\0') {
    std::fprintf(stderr, "scheduler_replay: found '%s', expected a number\n", text);
    std::exit(2);
  }
  return number;
}

}  // namespace

int main(int argc, char** argv) {
  using lora_serve::testing::Overlap;
  if (argc != 5) {
    std::fprintf(stderr,
                 "usage: scheduler_replay SEED NUM_STEPS PADDING_BYTES REQUEST_ID_FACTOR\n");
    return 2;
  }
  const auto seed = static_cast<std::uint64_t>(ParseNumber(argv[1]));
  const auto num_padding_bytes = static_cast<std::size_t>(ParseNumber(argv[3]));
  const std::int64_t factor = ParseNumber(argv[4]);
  lora_serve::testing::RandomCoverage coverage;
  lora_serve::testing::RandomSchedulerRun run(seed, seed % 2 == 0 ? Overlap::kOff : Overlap::kOn,
                                              &coverage);
  run.request_id_factor = factor;
  std::vector<std::unique_ptr<char[]>> padding;
  run.on_plan = [&](lora_serve::testing::RecordedPlan plan) {
    if (num_padding_bytes > 0) {
      padding.push_back(std::make_unique<char[]>(num_padding_bytes));
      if (padding.size() % 3 == 0) padding[padding.size() / 2].reset();
    }
    for (std::int64_t& id : plan.request_ids) id /= factor;
    for (std::int64_t& id : plan.expired_request_ids) id /= factor;
    std::puts(plan.ToText().c_str());
  };
  run.Run(ParseNumber(argv[2]));
  return ::testing::UnitTest::GetInstance()->Failed() ? 1 : 0;
}
