#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>

namespace lora_serve {

/// Where the choices of random operations come from.
class OperationChooser {
 public:
  OperationChooser() = default;
  virtual ~OperationChooser() = default;
  OperationChooser(const OperationChooser&) = delete;
  OperationChooser& operator=(const OperationChooser&) = delete;

  /// One of 0, ..., num_choices - 1. Requires: num_choices > 0.
  [[nodiscard]] virtual std::size_t Choose(std::size_t num_choices) = 0;
  /// True: there is nothing left to choose from, stop.
  [[nodiscard]] virtual bool IsExhausted() const { return false; }

  /// One of low, ..., high.
  [[nodiscard]] std::int32_t Between(std::int32_t low, std::int32_t high) {
    return low + static_cast<std::int32_t>(Choose(static_cast<std::size_t>(high - low) + 1));
  }
  [[nodiscard]] bool Chance(std::size_t percent) { return Choose(100) < percent; }
};

class SeededChooser final : public OperationChooser {
 public:
  explicit SeededChooser(std::uint64_t seed) : random_(seed) {}
  [[nodiscard]] std::size_t Choose(std::size_t num_choices) override {
    return random_() % num_choices;
  }

 private:
  std::mt19937_64 random_;
};

/// Reads its choices from bytes: one for up to 256 choices, two for more. Without bytes left it
/// always chooses 0.
class ByteChooser final : public OperationChooser {
 public:
  explicit ByteChooser(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  [[nodiscard]] std::size_t Choose(std::size_t num_choices) override {
    if (num_choices <= 1) return 0;
    const std::size_t low = TakeByte();
    return (num_choices <= 256 ? low : low + 256 * TakeByte()) % num_choices;
  }
  [[nodiscard]] bool IsExhausted() const override { return bytes_.empty(); }

 private:
  std::size_t TakeByte() {
    if (bytes_.empty()) return 0;
    const std::uint8_t byte = bytes_.front();
    bytes_ = bytes_.subspan(1);
    return byte;
  }

  std::span<const std::uint8_t> bytes_;
};

}  // namespace lora_serve
