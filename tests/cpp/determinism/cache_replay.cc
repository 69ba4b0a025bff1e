#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kv_prefix_cache/cache_operations.h"

// cache_replay SEED NUM_OPERATIONS PADDING_BYTES
//
// Runs random operations on a cache and prints its dumps. The seed alone decides the calls; the
// padding gives all nodes other addresses, and the build may give pages other hashes.

namespace {

std::uint64_t ParseNumber(const char* text) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), number);
  if (error != std::errc{} || *end != '\0') {
    std::fprintf(stderr, "cache_replay: found '%s', expected a number\n", text);
    std::exit(2);
  }
  return number;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: cache_replay SEED NUM_OPERATIONS PADDING_BYTES\n");
    return 2;
  }
  const std::uint64_t num_operations = ParseNumber(argv[2]);
  const auto num_padding_bytes = static_cast<std::size_t>(ParseNumber(argv[3]));
  lora_serve::SeededChooser chooser(ParseNumber(argv[1]));
  lora_serve::OperationCoverage coverage;
  lora_serve::CacheOperations operations(lora_serve::ChooseAnyConfig(chooser), &chooser, &coverage);
  std::vector<std::unique_ptr<char[]>> padding;
  constexpr std::uint64_t kDumpInterval = 100;
  for (std::uint64_t done = 0; done < num_operations; done += kDumpInterval) {
    for (int block = 0; block < 50 && num_padding_bytes > 0; ++block) {
      padding.push_back(std::make_unique<char[]>(num_padding_bytes));
      if (padding.size() % 3 == 0) padding.front().reset();
    }
    operations.Run(kDumpInterval);
    std::puts(operations.cache().Dump().c_str());
  }
  operations.Finish();
  return 0;
}
