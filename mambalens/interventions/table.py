"""Columns of the tables of patches and traces, and what figures call them."""

from __future__ import annotations

PATCHES = (
    "fact_id", "other_id", "model", "site", "window_start", "window_size", "position", "role", "piece",
    "base_prob", "base_log_odds", "base_other_prob", "base_other_log_odds", "base_logit_difference",
    "prob", "log_odds", "other_prob", "other_log_odds", "logit_difference", "moved",
)  # fmt: skip
"""Columns of patches, one row for every pair, window and position or role.

`position` is -1 where a role is patched, `role` then its name (else 'each'), `piece` what the position is (see
`facts.pieces`; the role's name for a role). `prob` and `log_odds` (in nats) are those of the fact's own answer,
`other_prob` and `other_log_odds` those of the other fact's, `logit_difference` the own answer's logit less the other's;
with `base_` in front, the same without a patch. `moved` is how far the patch moves the logit difference from the
prompt's own (0) to the one that the other prompt has (1); NaN where these are equal."""

PATCH_MEASURED = ("base_measure", "measure")
"""Columns that patches with a measure have behind the others: it of the own answer without a patch, and with it."""

TRACES = (
    "fact_id", "model", "corruption", "sample", "site", "window_start", "window_size", "position", "role", "piece",
    "clean_prob", "clean_log_odds", "corrupted_prob", "corrupted_log_odds", "prob", "log_odds", "effect",
)  # fmt: skip
"""Columns of traces, one row for every fact, sample of the noise, window and position or role.

`prob` and `log_odds` (in nats) are those of the fact's answer in the corrupted run with one site restored, with
`clean_` and `corrupted_` in front those of the clean run and the corrupted one. `effect` is the indirect effect,
`prob - corrupted_prob` (Meng et al. 2022, section 2.1). `corruption` is 'noise 3' or the like, or 'swap'."""

TRACE_MEASURED = ("clean_measure", "corrupted_measure", "measure")
"""Columns that traces with a measure have behind the others: it of the answer in the clean run, in the corrupted one,
and in that with a site restored."""

GROUP = ("model", "site", "window_size", "window_start", "piece")
"""Columns that a mean over facts keeps apart."""

PATCH_METRICS = {
    "moved": "Logit difference moved towards the other prompt's (share)",
    "logit_difference": "Logit difference of the two answers",
    "prob": "Probability of the own answer",
    "other_prob": "Probability of the other answer",
    "log_odds": "Log-odds of the own answer (nats)",
    "other_log_odds": "Log-odds of the other answer (nats)",
}
"""Columns of patches that can be summarized and drawn, and what axes call them."""

TRACE_METRICS = {
    "effect": "Indirect effect on the answer's probability",
    "prob": "Probability of the answer",
    "log_odds": "Log-odds of the answer (nats)",
}
"""Columns of traces that can be summarized and drawn, and what axes call them."""
