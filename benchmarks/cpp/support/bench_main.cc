#include <benchmark/benchmark.h>

#include <string>

// The compiler stands in the output's context, where append_results.py finds it.

namespace {

std::string CompilerName() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::AddCustomContext("compiler", CompilerName());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
