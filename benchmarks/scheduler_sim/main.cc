// scheduler_sim: serves a workload in virtual time with the scheduler of csrc/, or with a baseline,
// and prints what it measured. README.md describes it; --help lists the options.

#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "common/errors.h"
#include "scheduler_sim/report.h"
#include "scheduler_sim/sim_options.h"
#include "scheduler_sim/simulation.h"

namespace lora_serve::sim {
namespace {

DeviceModel ReadDevice(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw InvalidArgumentError("cannot read the device model, --device '" + path + "'");
  return DeviceModel::Read(file);
}

std::ofstream Create(const std::string& path) {
  std::ofstream file(path);
  if (!file) throw InvalidArgumentError("cannot write '" + path + "'");
  return file;
}

/// Returns the exit status.
int Run(const SimOptions& options) {
  const DeviceModel model = ReadDevice(options.device_path);
  const AdapterCatalog catalog(model, options.workload.popularity.num_adapters,
                               ParseRanks(options.lora_ranks));
  const std::unique_ptr<RequestSource> source = MakeRequestSource(options.workload);
  const std::unique_ptr<ServingSystem> system = MakeSystem(options, model, catalog);
  const auto start = std::chrono::steady_clock::now();
  Simulate(*source, *system);
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;

  Report report = MakeReport(*system, wall.count());
  if (options.system == "lora_serve") {
    const std::vector<RequestRecord>& requests = system->recorder().requests();
    report.max_bound_share = MaxBoundShare(
        requests, BoundInputsOf(options, model, catalog, requests), options.max_num_batched_tokens);
  }
  WriteTable(std::cout, report);
  if (!options.csv_path.empty()) {
    std::ofstream file = Create(options.csv_path);
    WriteCsv(file, LabelsOf(options), report);
  }
  if (!options.quantiles_path.empty()) {
    std::ofstream file = Create(options.quantiles_path);
    WriteQuantiles(file, *system);
  }
  if (options.check_bound_steps > 0 && report.max_waited_steps > options.check_bound_steps) {
    std::cerr << "a request waited for " << report.max_waited_steps << " steps; the bound is "
              << options.check_bound_steps << '\n';
    return 1;
  }
  if (options.check_bound && report.max_bound_share > 1.0) {
    std::cerr << "a request waited for " << report.max_bound_share << " times its bound\n";
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace lora_serve::sim

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  for (const std::string& argument : arguments) {
    if (argument != "--help") continue;
    std::cout << "scheduler_sim: a workload in virtual time\n" << lora_serve::sim::SimOptionsHelp();
    return 0;
  }
  try {
    return lora_serve::sim::Run(lora_serve::sim::ParseSimOptions(arguments));
  } catch (const std::exception& error) {
    std::cerr << "scheduler_sim: " << error.what() << '\n';
    return 2;
  }
}
