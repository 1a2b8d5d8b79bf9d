"""The paper's incremental SVD: a rank-k factorization, updated batch after batch."""

from __future__ import annotations

from torch import Tensor

from eva_lightning.svd.inputs import require_finite, squared_norm, token_mean, wide_dtype
from eva_lightning.svd.low_rank import Factor, FactoredSVD, combine


class IncrementalSVD(FactoredSVD):
    """Incremental SVD of Ross et al. (2008), Algorithm 2 of the EVA paper.

    Only the top k singular values and right-singular vectors, the running mean and the running total variance are
    kept. A batch X with mean x, arriving after n tokens of mean m, is added by a truncated SVD of the stacked rows
    ``[diag(sigma) V; X - x; sqrt(n b / (n + b)) (m - x)]``; the last row corrects for the moving mean. (Its weight is
    that of Ross et al. and of scikit-learn; the one printed in line 6 of Algorithm 2 does not reproduce the covariance
    of the union.) The total variance follows Chan et al. (1983) and is exact, so explained-variance ratios have the
    true denominator although the tail of the spectrum is forgotten. What is truncated is lost: the result depends
    (slightly) on the order of the batches, and a direction that is weak at first may be underestimated.

    Tokens wait in a buffer until there are at least k of them; :meth:`result` counts those waiting too.

    Args and errors: see :class:`~eva_lightning.svd.engine.StreamingSVD`.
    """

    @staticmethod
    def kept(dim: int, k: int) -> int:
        """Rows of the factorization."""
        return k

    def _add(self, tokens: Tensor) -> None:
        mean = token_mean(tokens)
        centred = (tokens - mean).float()
        wide = wide_dtype(tokens.device)
        total = float(squared_norm(centred))
        require_finite(total)
        self._set(combine(self._factor, Factor(centred, mean.to(wide), len(tokens), total), self.k))

    def _counted(self) -> int:
        return 0 if self._factor is None else self._factor.n

    def _condensed(self) -> Factor | None:
        return self._factor
