#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "adapter_weights/place_matrices.h"
#include "array_conversion.h"
#include "bindings.h"

namespace lora_serve::bindings {
namespace {

namespace py = pybind11;

/// Throws: InvalidArgumentError where a weights file has no such format, or we do not read it.
NumberFormat FormatOf(const std::string& name) {
  if (name == "F32") return NumberFormat::kF32;
  if (name == "F16") return NumberFormat::kF16;
  if (name == "BF16") return NumberFormat::kBF16;
  throw InvalidArgumentError("number_format is '" + name + "'; expected 'F32', 'F16' or 'BF16'");
}

void BindMatrixPlacement(py::module_& module) {
  py::class_<MatrixPlacement>(module, "MatrixPlacement", R"doc(
Where a matrix lies as it is stored, row by row, and where it goes.

Parameters
----------
buffer_offset : int
    Bytes from the buffer's start, at any multiple.
num_rows, num_columns : int
    At least 1 each.
number_format : str
    ``F32``, ``F16`` or ``BF16``.
is_transposed : bool
    True: the block has each part's columns as rows.
parts : list of tuple of int
    Number of rows, and bytes from the block's start, of each matrix of the block that is made of this one, in the
    order of the rows; together they have all of them.

Raises
------
InvalidArgumentError
    There is no such number format.
)doc")
      .def(py::init([](std::int64_t buffer_offset, std::int64_t num_rows, std::int64_t num_columns,
                       const std::string& number_format, bool is_transposed,
                       const std::vector<std::pair<std::int64_t, std::int64_t>>& parts) {
             MatrixPlacement matrix{.buffer_offset = buffer_offset,
                                    .num_rows = num_rows,
                                    .num_columns = num_columns,
                                    .format = FormatOf(number_format),
                                    .is_transposed = is_transposed,
                                    .parts = {}};
             for (const auto& [part_rows, block_offset] : parts)
               matrix.parts.push_back({.num_rows = part_rows, .block_offset = block_offset});
             return matrix;
           }),
           py::kw_only(), py::arg("buffer_offset"), py::arg("num_rows"), py::arg("num_columns"),
           py::arg("number_format"), py::arg("is_transposed"), py::arg("parts"));
}

}  // namespace

void BindAdapterWeights(py::module_& module) {
  py::enum_<NumbersFound>(module, "NumbersFound",
                          "What the numbers of a matrix are; compare with ==.")
      .value("FINITE", NumbersFound::kFinite)
      .value("NOT_FINITE", NumbersFound::kNotFinite, "NaN or infinity is stored.")
      .value("TOO_LARGE", NumbersFound::kTooLarge,
             "What is stored is finite, but too large for the block's format.");
  BindMatrixPlacement(module);
  module.def(
      "place_matrices",
      [](const py::array& buffer, const std::vector<MatrixPlacement>& matrices, py::array& block,
         const std::string& number_format) {
        const auto stored = Entries<std::uint8_t>(buffer, "buffer");
        const auto placed = WritableEntries<std::uint8_t>(block, "block");
        const NumberFormat format = FormatOf(number_format);
        // It takes milliseconds, and the step loop needs the lock meanwhile.
        const py::gil_scoped_release release;
        return PlaceMatrices(std::as_bytes(stored), matrices, std::as_writable_bytes(placed),
                             format);
      },
      py::arg("buffer"), py::arg("matrices"), py::arg("block"), py::arg("number_format"), R"doc(
Bring matrices from the buffer that they were read into to their places in an adapter's block.

Each number is converted to the nearest of the block's format, ties to even; what is too large becomes infinite.
The interpreter lock is released meanwhile; neither array may be written by others.

Parameters
----------
buffer : numpy.ndarray, uint8, contiguous
    What was read.
matrices : list of MatrixPlacement
    Their parts do not overlap.
block : numpy.ndarray, uint8, contiguous and writable
    Bytes outside the parts are not touched.
number_format : str
    That of the block: ``F32``, ``F16`` or ``BF16``.

Returns
-------
list of NumbersFound
    One a matrix. What one of ``NOT_FINITE`` leaves in its parts means nothing.

Raises
------
InternalError
    A matrix or a part does not lie in its array, or parts do not have all rows; nothing was written.
InvalidArgumentError
    An array or the number format is not as described.
)doc");
}

}  // namespace lora_serve::bindings
