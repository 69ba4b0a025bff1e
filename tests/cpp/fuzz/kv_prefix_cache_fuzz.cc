#include <cstddef>
#include <cstdint>
#include <span>

#include "kv_prefix_cache/cache_operations.h"

// The random test's operations, chosen by a fuzzer: the first bytes are the cache's configuration,
// the others what happens to it. A disagreement with the model is an exception that nobody catches.

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::int64_t kMaxOperations = 2'000;
  lora_serve::ByteChooser chooser(std::span(data, size));
  lora_serve::OperationCoverage coverage;
  lora_serve::CacheOperations operations(lora_serve::ChooseAnyConfig(chooser), &chooser, &coverage);
  operations.Run(kMaxOperations);
  operations.Finish();
  return 0;
}
