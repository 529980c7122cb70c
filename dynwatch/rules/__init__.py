"""Stop rules: small state machines that read numbers and say when a run is poor, and why.

A rule knows nothing of models, devices or Lightning. It is fed the readings of one step after the
other and answers with a `Verdict` or None.
"""

from dynwatch.rules.base import EVIDENCE_LENGTH, Action, Recent, Rule, Verdict
from dynwatch.rules.dead_experts import DeadExperts
from dynwatch.rules.dead_layers import DeadLayers
from dynwatch.rules.divergence import Divergence
from dynwatch.rules.gradient_explosion import GradientExplosion
from dynwatch.rules.large_steps import LargeSteps
from dynwatch.rules.loss_spike import LossSpike
from dynwatch.rules.no_learning import NoLearning
from dynwatch.rules.non_finite import NonFinite
from dynwatch.rules.old_logs import Replayed, replay
from dynwatch.rules.overfitting import Overfitting
from dynwatch.rules.plateau import Plateau
from dynwatch.rules.replaying import Outcome, replay_readings
from dynwatch.rules.router_collapse import RouterCollapse
from dynwatch.rules.router_logits import RouterLogits
from dynwatch.rules.rulebook import Rulebook, apply_actions
from dynwatch.rules.sharpness import Sharpness
from dynwatch.rules.ska_equilibrium import SKAEquilibrium
from dynwatch.rules.stop_when import StopWhen
from dynwatch.rules.vanishing_gradients import VanishingGradients

__all__ = [
    "EVIDENCE_LENGTH",
    "Action",
    "DeadExperts",
    "DeadLayers",
    "Divergence",
    "GradientExplosion",
    "LargeSteps",
    "LossSpike",
    "NoLearning",
    "NonFinite",
    "Outcome",
    "Overfitting",
    "Plateau",
    "Recent",
    "Replayed",
    "RouterCollapse",
    "RouterLogits",
    "Rule",
    "Rulebook",
    "SKAEquilibrium",
    "Sharpness",
    "StopWhen",
    "VanishingGradients",
    "Verdict",
    "apply_actions",
    "default_rules",
    "replay",
    "replay_readings",
]


def default_rules() -> list[Rule]:
    """The rules that `EarlyTermination` asks by default, with their defaults.

    `NonFinite` and `Divergence` stop a run; the others warn.

    Example:
        >>> [rule.name for rule in default_rules() if rule.action == "stop"]
        ['non_finite', 'divergence']
    """
    return [
        NonFinite(),
        Divergence(),
        LossSpike(),
        GradientExplosion(),
        VanishingGradients(),
        DeadLayers(),
        NoLearning(),
        Plateau(),
        Overfitting(),
        Sharpness(),
        LargeSteps(),
        RouterCollapse(),
        DeadExperts(),
        RouterLogits(),
    ]
