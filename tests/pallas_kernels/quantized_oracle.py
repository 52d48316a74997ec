"""Products with quantized matrices as their definition reads: float64, one group at a time.

Also what a case of the op is made of, and how far from the definition a right answer may lie. It
shares no code with the op.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

UNIT = 2.0**-24
"""The largest relative error of rounding to f32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of one call.

    Attributes:
        x: f32 [T, in].
        values: int8, float8_e4m3fn or packed uint8, as the op takes them.
        scales: f32 [out, groups].
        minimums: f32 [out, groups] beside uint8; else None.
        quantizes_inputs: whether x is rounded to int8.
        keeps_largest: whether the largest of each group of x is not.
        dots_pairs: whether a body takes the largest, and products with minimums, as bfloat16: then
            what that leaves of the largest is rounded with the others.
    """

    x: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray | None
    quantizes_inputs: bool
    keeps_largest: bool = False
    dots_pairs: bool = False

    def weight(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns f64 [out, in] that the matrix stands for, and how far f32 may lie from each."""
        num_rows, num_groups = self.scales.shape
        numbers = self.numbers()
        group = numbers.shape[1] // num_groups
        weight, slack = np.zeros(numbers.shape), np.zeros(numbers.shape)
        for g in range(num_groups):
            own = slice(g * group, (g + 1) * group)
            scaled = numbers[:, own] * self.scales[:, g : g + 1].astype(np.float64)
            minimum = np.zeros((num_rows, 1))
            if self.minimums is not None:
                minimum = self.minimums[:, g : g + 1].astype(np.float64)
            weight[:, own] = scaled + minimum
            # A product and a sum, rounded once or twice.
            slack[:, own] = 2 * UNIT * (np.abs(scaled) + np.abs(minimum))
        return weight, slack

    def numbers(self) -> np.ndarray:
        """Returns f64 [out, in] of small numbers, unpacked."""
        if self.values.dtype != np.uint8:
            return self.values.astype(np.float64)
        num_rows, num_groups = self.scales.shape
        half = self.values.shape[1] // num_groups
        numbers = np.zeros((num_rows, 2 * self.values.shape[1]))
        for g in range(num_groups):
            for i in range(half):
                byte = self.values[:, g * half + i].astype(int)
                numbers[:, 2 * g * half + i] = byte % 16
                numbers[:, (2 * g + 1) * half + i] = byte // 16
        return numbers

    def product(
        self, dtype: np.dtype, *, rounds_weights: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns f64 [T, out], and how far from each a right answer may lie.

        A body may leave a group's scale to its part of the sum: such a one rounds no weights.

        A sum of n products in f32 is n roundings from its value at most, each of a part of the sum
        of magnitudes. Where the definition rounds to a coarser type, a number that lies between
        two of them may become either.
        """
        if self.quantizes_inputs:
            return self._integer_product()
        weight, weight_slack = self.weight()
        x = self.x.astype(np.float64)
        if dtype == ml_dtypes.bfloat16:
            x = rounded(x)
            if rounds_weights and (self.values.dtype == np.uint8 or self.scales.shape[1] > 1):
                edges = rounded(weight - weight_slack), rounded(weight + weight_slack)
                weight, weight_slack = rounded(weight), np.abs(edges[1] - edges[0])
        magnitude = np.abs(x) @ np.abs(weight).T
        num_roundings = self.x.shape[1] + 4
        slack = np.abs(x) @ weight_slack.T + num_roundings * UNIT * magnitude
        return x @ weight.T, slack

    def _integer_product(self) -> tuple[np.ndarray, np.ndarray]:
        num_groups = self.scales.shape[1]
        group = self.x.shape[1] // num_groups
        numbers = self.numbers()
        product = np.zeros((len(self.x), len(numbers)))
        slack = np.zeros(product.shape)
        for g in range(num_groups):
            own = slice(g * group, (g + 1) * group)
            kept = np.zeros((len(self.x), group))
            if self.keeps_largest:
                each, place = np.arange(len(self.x)), np.abs(self.x[:, own]).argmax(axis=1)
                kept[each, place] = self.x[:, own][each, place]
                kept = rounded(kept) if self.dots_pairs else kept
            rows, steps, ties = rounded_to_int8(self.x[:, own] - kept.astype(np.float32))
            scaled = numbers[:, own] * self.scales[:, g : g + 1].astype(np.float64)
            product += kept @ scaled.T
            slack += (num_groups + 6) * UNIT * np.abs(kept @ scaled.T)
            scale = steps * self.scales[:, g].astype(np.float64)
            product += rows @ numbers[:, own].T * scale
            slack += ties @ np.abs(numbers[:, own]).T * scale
            # The scales, their product with the sum, and the sum over groups.
            slack += (num_groups + 6) * UNIT * np.abs(rows @ numbers[:, own].T) * scale
            if self.minimums is not None:
                minimums = self.minimums[:, g].astype(np.float64)
                parts = rows.sum(axis=1, keepdims=True) * steps, kept.sum(axis=1, keepdims=True)
                product += (parts[0] + parts[1]) * minimums
                sums = np.abs(parts[0]) + np.abs(parts[1])
                slack += ties.sum(axis=1, keepdims=True) * steps * np.abs(minimums)
                slack += (2 * num_groups + 6) * UNIT * np.abs(sums * minimums)
                if self.dots_pairs:
                    scales = self.scales[:, g].astype(np.float64)
                    # The codes' middle is exact in f32. The rest of the minimum, by an inverse of
                    # 14 bits, has eight; so has the sum that it is multiplied with.
                    slack += (2 * num_groups + 6) * UNIT * 8 * np.abs(sums * scales)
                    total = np.abs(parts[0] + parts[1])
                    rest = 2.0**-7 * np.abs(minimums + 8 * scales) + 2.0**-14 * np.abs(minimums)
                    slack += 1.05 * total * rest
        return product, slack

    def with_fault(self, fault: str) -> "Case":
        """Returns a case whose right answer is what an op with this fault would give."""
        if fault == "nibbles swapped":
            return replace(self, values=self.values << 4 | self.values >> 4)
        if fault == "a dropped group":
            lost = np.arange(self.scales.shape[1]) == self.scales.shape[1] // 2
            minimums = None if self.minimums is None else np.where(lost, 0, self.minimums)
            return replace(self, scales=np.where(lost, 0, self.scales), minimums=minimums)
        if fault == "the neighbour's scale":
            return replace(self, scales=np.roll(self.scales, 1, axis=1))
        if fault == "the next row's scale":
            return replace(self, scales=np.roll(self.scales, 1, axis=0))
        assert fault == "no minimum"
        return replace(self, minimums=np.zeros_like(self.minimums))


def rounded(values: np.ndarray) -> np.ndarray:
    """Rounds f64 values to bfloat16's, by way of f32 as the op comes by them."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def rounded_to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds each row of f32 to int8: returns f64 numbers, steps [rows, 1], and which are ties.

    A tie is a number so near the middle between two others that f32's errors decide.
    """
    values = values.astype(np.float64)
    largest = np.abs(values).max(axis=1, keepdims=True)
    steps = largest / 127
    exact = np.divide(values, steps, out=np.zeros_like(values), where=largest > 0)
    ties = np.abs(np.abs(exact) % 1 - 0.5) < 127 * 4 * UNIT
    return np.round(exact), steps, ties.astype(np.float64)
