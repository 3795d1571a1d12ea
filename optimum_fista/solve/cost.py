"""What a pruning method asks of the machine, foretold from its options."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_fista.solve.blocks import rows_in_block


@dataclass(frozen=True)
class SolveCost:
    """Cost of pruning one operator [out, in], besides the problem itself and the result; float32 throughout.

    Attributes:
        products: Products of a matrix [out, in] with one [in, in], 2 out in^2 operations each.
        factor: Factorisations, inverses and products of Gram matrices, in units of in^3 operations: a Cholesky
            factorisation 1/3, an inverse from it 2/3, a product 2.
        sweeps: Passes over a matrix [out, in] that read and write it.
        column_steps: Small operations a column, on vectors [out] or blocks, if the method works column by column.
        working: What is held at a time, by phase: matrices [out, in] and matrices [in, in].
        block: Matrices of a block of rows (`solve.blocks.row_blocks`) held besides, in all phases.
        shares_factor: Whether operators that share their inputs share `factor` and the Gram matrices.
    """

    products: float = 1.0
    factor: float = 0.0
    sweeps: float = 10.0
    column_steps: float = 0.0
    working: tuple[tuple[float, float], ...] = ((3.75, 0.0),)
    block: float = 0.0
    shares_factor: bool = False

    def working_bytes(self, rows: int, columns: int, scale: int = 1) -> int:
        """Most bytes held at a time for an operator [rows, columns], in blocks `scale` times as large as on a CPU."""
        held = max(int(4 * columns * (operator * rows + gram * columns)) for operator, gram in self.working)
        return held + int(4 * columns * self.block * rows_in_block(rows, columns, scale))

    def product_operations(self, rows: int, columns: int) -> float:
        """Floating-point operations of `products`."""
        return self.products * 2.0 * rows * columns**2

    def factor_operations(self, columns: int) -> float:
        """Floating-point operations of `factor`."""
        return self.factor * float(columns) ** 3
