#include "scheduler_sim/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace lora_serve::sim {
namespace {

/// The value of nearest rank. Requires: sorted.
double SortedQuantile(const std::vector<float>& values, double fraction) {
  if (values.empty()) return 0.0;
  const auto rank =
      static_cast<std::int64_t>(std::ceil(fraction * static_cast<double>(values.size())));
  return static_cast<double>(
      values[static_cast<std::size_t>(std::clamp<std::int64_t>(rank, 1, std::ssize(values)) - 1)]);
}

/// Times of the requests that were served, in microseconds.
struct RequestTimes {
  std::vector<float> ttft;
  std::vector<float> e2e;
  std::vector<float> queue;
};

RequestTimes TimesOf(const Recorder& recorder, bool only_rare) {
  RequestTimes times;
  for (const RequestRecord& request : recorder.requests()) {
    if (request.was_refused || (only_rare && !request.is_rare)) continue;
    times.ttft.push_back(static_cast<float>(request.first_token_us - request.arrival_us));
    times.e2e.push_back(static_cast<float>(request.last_token_us - request.arrival_us));
    times.queue.push_back(static_cast<float>(request.first_step_us - request.arrival_us));
  }
  return times;
}

void FillSteps(const Recorder& recorder, Report& report) {
  const StepSums& steps = recorder.steps();
  const double num_steps = std::max(1.0, static_cast<double>(steps.num_steps));
  report.num_steps = steps.num_steps;
  report.rows_per_step = static_cast<double>(steps.num_rows) / num_steps;
  report.adapters_per_step = static_cast<double>(steps.num_adapters) / num_steps;
  report.prefill_tokens_per_step = static_cast<double>(steps.num_prefill_tokens) / num_steps;
  report.busy_share = static_cast<double>(steps.busy_us) / 1e6 / report.duration_s;
  report.stall_share = static_cast<double>(steps.stall_us) / 1e6 / report.duration_s;
}

void FillWaitedSteps(const Recorder& recorder, Report& report) {
  std::vector<float> waited;
  for (const RequestRecord& request : recorder.requests()) {
    if (!request.was_refused) waited.push_back(static_cast<float>(request.num_waited_steps));
  }
  std::ranges::sort(waited);
  report.p99_waited_steps = SortedQuantile(waited, 0.99);
  report.max_waited_steps = std::llround(SortedQuantile(waited, 1.0));
}

}  // namespace

Percentiles ExactPercentiles(std::vector<float>& values_us) {
  std::ranges::sort(values_us);
  return {.p50 = SortedQuantile(values_us, 0.50) / 1e3,
          .p90 = SortedQuantile(values_us, 0.90) / 1e3,
          .p99 = SortedQuantile(values_us, 0.99) / 1e3,
          .max = SortedQuantile(values_us, 1.0) / 1e3};
}

Percentiles HistogramPercentiles(const LatencyHistogram& histogram) {
  return {.p50 = histogram.Percentile(0.50) / 1e3,
          .p90 = histogram.Percentile(0.90) / 1e3,
          .p99 = histogram.Percentile(0.99) / 1e3,
          .max = static_cast<double>(histogram.max()) / 1e3};
}

Report MakeReport(const ServingSystem& system, double wall_s) {
  const Recorder& recorder = system.recorder();
  Report report;
  report.wall_s = wall_s;
  report.num_requests = std::ssize(recorder.requests());
  report.num_refused = recorder.num_refused();
  TimeUs last_token_us = 0;
  std::int64_t num_tokens = 0;
  for (const RequestRecord& request : recorder.requests()) {
    last_token_us = std::max(last_token_us, request.last_token_us);
    num_tokens += request.num_tokens;
  }
  const TimeUs first_arrival_us =
      recorder.requests().empty() ? 0 : recorder.requests().front().arrival_us;
  const TimeUs duration_us = std::max<TimeUs>(last_token_us - first_arrival_us, 1);
  report.duration_s = static_cast<double>(duration_us) / 1e6;
  report.output_tokens_per_s = static_cast<double>(num_tokens) / report.duration_s;
  report.requests_per_s = static_cast<double>(recorder.num_ended()) / report.duration_s;

  RequestTimes all = TimesOf(recorder, false);
  report.ttft = ExactPercentiles(all.ttft);
  report.e2e = ExactPercentiles(all.e2e);
  report.queue = ExactPercentiles(all.queue);
  report.itl = HistogramPercentiles(recorder.itl());
  RequestTimes rare = TimesOf(recorder, true);
  report.num_rare_requests = std::ssize(rare.ttft);
  report.rare_ttft = ExactPercentiles(rare.ttft);
  report.rare_e2e = ExactPercentiles(rare.e2e);
  report.rare_itl = HistogramPercentiles(recorder.rare_itl());

  FillSteps(recorder, report);
  FillWaitedSteps(recorder, report);
  report.counts = system.Counts();
  report.hit_rate = static_cast<double>(report.counts.num_hit_tokens) /
                    std::max(1.0, static_cast<double>(report.counts.num_queried_tokens));
  return report;
}

std::vector<ReportField> FieldsOf(const Report& report) {
  std::vector<ReportField> fields;
  const auto add = [&](const std::string& name, auto value) {
    fields.push_back({name, static_cast<double>(value)});
  };
  const auto add_percentiles = [&](const std::string& name, const Percentiles& values) {
    add(name + "_p50_ms", values.p50);
    add(name + "_p90_ms", values.p90);
    add(name + "_p99_ms", values.p99);
    add(name + "_max_ms", values.max);
  };
  add("requests", report.num_requests);
  add("refused", report.num_refused);
  add("duration_s", report.duration_s);
  add("output_tokens_per_s", report.output_tokens_per_s);
  add("requests_per_s", report.requests_per_s);
  add_percentiles("ttft", report.ttft);
  add_percentiles("itl", report.itl);
  add_percentiles("e2e", report.e2e);
  add_percentiles("queue", report.queue);
  add("rare_requests", report.num_rare_requests);
  add_percentiles("rare_ttft", report.rare_ttft);
  add_percentiles("rare_itl", report.rare_itl);
  add_percentiles("rare_e2e", report.rare_e2e);
  add("host_loads", report.counts.num_host_loads);
  add("disk_loads", report.counts.num_disk_loads);
  add("evictions", report.counts.num_evictions);
  add("preemptions", report.counts.num_preemptions);
  add("hit_rate", report.hit_rate);
  add("steps", report.num_steps);
  add("rows_per_step", report.rows_per_step);
  add("adapters_per_step", report.adapters_per_step);
  add("prefill_tokens_per_step", report.prefill_tokens_per_step);
  add("busy_share", report.busy_share);
  add("stall_share", report.stall_share);
  add("waited_steps_p99", report.p99_waited_steps);
  add("waited_steps_max", report.max_waited_steps);
  add("bound_share_max", report.max_bound_share);
  add("wall_s", report.wall_s);
  return fields;
}

void WriteTable(std::ostream& output, const Report& report) {
  char line[160];
  const auto write = [&](const char* format, auto... values) {
    std::snprintf(line, sizeof line, format, values...);
    output << line << '\n';
  };
  write("%-22s %10s %10s %10s %10s", "milliseconds", "p50", "p90", "p99", "max");
  const auto write_percentiles = [&](const char* name, const Percentiles& values) {
    write("%-22s %10.1f %10.1f %10.1f %10.1f", name, values.p50, values.p90, values.p99,
          values.max);
  };
  write_percentiles("TTFT", report.ttft);
  write_percentiles("ITL", report.itl);
  write_percentiles("E2E", report.e2e);
  write_percentiles("queue", report.queue);
  write_percentiles("TTFT, rarest tenth", report.rare_ttft);
  write_percentiles("ITL, rarest tenth", report.rare_itl);
  write_percentiles("E2E, rarest tenth", report.rare_e2e);
  write(
      "%.0f output tokens/s, %.2f requests/s, %lld requests (%lld of rare adapters, %lld refused)",
      report.output_tokens_per_s, report.requests_per_s,
      static_cast<long long>(report.num_requests), static_cast<long long>(report.num_rare_requests),
      static_cast<long long>(report.num_refused));
  write(
      "%lld steps, %.1f rows, %.1f adapters, %.0f prefill tokens a step; busy %.1f%%, stalled "
      "%.1f%%",
      static_cast<long long>(report.num_steps), report.rows_per_step, report.adapters_per_step,
      report.prefill_tokens_per_step, 100.0 * report.busy_share, 100.0 * report.stall_share);
  write("loads: %lld from the host, %lld from disk; %lld evictions, %lld preemptions",
        static_cast<long long>(report.counts.num_host_loads),
        static_cast<long long>(report.counts.num_disk_loads),
        static_cast<long long>(report.counts.num_evictions),
        static_cast<long long>(report.counts.num_preemptions));
  if (report.max_bound_share > 0.0) {
    write("longest wait: %.2f%% of its bound", 100.0 * report.max_bound_share);
  }
  write("prefix hits %.1f%%; waited steps p99 %.0f, max %lld; simulated %.1f s in %.2f s",
        100.0 * report.hit_rate, report.p99_waited_steps,
        static_cast<long long>(report.max_waited_steps), report.duration_s, report.wall_s);
}

void WriteCsv(std::ostream& output, const std::vector<std::pair<std::string, std::string>>& labels,
              const Report& report) {
  std::string names;
  std::string values;
  for (const auto& [name, value] : labels) {
    names += name + ',';
    values += value + ',';
  }
  for (const ReportField& field : FieldsOf(report)) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", field.value);
    names += field.name + ',';
    values += std::string(text) + ',';
  }
  names.pop_back();
  values.pop_back();
  output << names << '\n' << values << '\n';
}

void WriteQuantiles(std::ostream& output, const ServingSystem& system) {
  RequestTimes times = TimesOf(system.recorder(), false);
  std::ranges::sort(times.ttft);
  std::ranges::sort(times.e2e);
  output << "quantile,ttft_ms,itl_ms,e2e_ms\n";
  const auto write = [&](double quantile) {
    output << quantile << ',' << SortedQuantile(times.ttft, quantile) / 1e3 << ','
           << system.recorder().itl().Percentile(quantile) / 1e3 << ','
           << SortedQuantile(times.e2e, quantile) / 1e3 << '\n';
  };
  for (int step = 1; step < 200; ++step) write(0.005 * step);
  write(0.999);
  write(1.0);
}

}  // namespace lora_serve::sim
