#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "scheduler_sim/serving_system.h"

namespace lora_serve::sim {

/// In milliseconds.
struct Percentiles {
  double p50 = 0.0;
  double p90 = 0.0;
  double p99 = 0.0;
  double max = 0.0;
};

/// Of values in microseconds, whose order is lost.
[[nodiscard]] Percentiles ExactPercentiles(std::vector<float>& values_us);
[[nodiscard]] Percentiles HistogramPercentiles(const LatencyHistogram& histogram);

/// The figures of one run.
struct Report {
  std::int64_t num_requests = 0;
  std::int64_t num_refused = 0;
  /// Virtual time from the first arrival to the last token.
  double duration_s = 0.0;
  double output_tokens_per_s = 0.0;
  double requests_per_s = 0.0;
  Percentiles ttft;
  Percentiles itl;
  Percentiles e2e;
  /// From arrival to the start of the first step.
  Percentiles queue;
  /// Of the requests whose adapter is one of the rarest tenth.
  std::int64_t num_rare_requests = 0;
  Percentiles rare_ttft;
  Percentiles rare_itl;
  Percentiles rare_e2e;
  SystemCounts counts;
  std::int64_t num_steps = 0;
  double rows_per_step = 0.0;
  double adapters_per_step = 0.0;
  double prefill_tokens_per_step = 0.0;
  /// Shares of the duration.
  double busy_share = 0.0;
  double stall_share = 0.0;
  double hit_rate = 0.0;
  /// Steps that started between the arrival of a request and its first token.
  std::int64_t max_waited_steps = 0;
  double p99_waited_steps = 0.0;
  /// The largest share of its bound that a request has waited; 0 for systems without a bound.
  double max_bound_share = 0.0;
  /// What the simulation itself took.
  double wall_s = 0.0;
};

[[nodiscard]] Report MakeReport(const ServingSystem& system, double wall_s);

/// A value of a run with its name, for the table and the CSV alike.
struct ReportField {
  std::string name;
  double value = 0.0;
};
[[nodiscard]] std::vector<ReportField> FieldsOf(const Report& report);

void WriteTable(std::ostream& output, const Report& report);
/// A line of names and a line of values; `labels` come first.
void WriteCsv(std::ostream& output, const std::vector<std::pair<std::string, std::string>>& labels,
              const Report& report);
/// `quantile,ttft_ms,itl_ms,e2e_ms` at 0.005, 0.010, ..., 0.995, 0.999, 1.
void WriteQuantiles(std::ostream& output, const ServingSystem& system);

}  // namespace lora_serve::sim
