"""Stop rules: small state machines that read numbers and say when a run is poor, and why.

A rule knows nothing of models, devices or Lightning. It is fed the readings of one step after the
other and answers with a `Verdict` or None.
"""

from dynwatch.rules.base import EVIDENCE_LENGTH, Action, Recent, Rule, Verdict
from dynwatch.rules.divergence import Divergence
from dynwatch.rules.non_finite import NonFinite

__all__ = ["EVIDENCE_LENGTH", "Action", "Divergence", "NonFinite", "Recent", "Rule", "Verdict"]
