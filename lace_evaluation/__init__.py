"""lace-eval: how well a bundle's pictures obey, in suites.

goal          a fixed list of conditions against a goal; the numbers of the README
conditional   targets of one, two, three and all attributes: ours beside the baselines, as the paper's tables
editing       the paper's sequential protocol
zero_shot     combinations that plain samples hardly ever show
logic         AND, OR, NOT, nested, bounds
solvers       accuracy and distance from a converged solution against evaluations
posterior     samples against the plain samples that satisfy a condition: ours, the flow, the baselines
oneshot       one-pass maps against exact samples and the flow; trains a map for each of its conditions

study.py holds what all of them share, methods.py and baselines.py what they compare, store.py what is finished.
goals.py says what was reached, exceptions.py where a baseline is ahead and why; statistics.py and nearness.py hold the
intervals. tables.py, plots.py, sheets.py and report.py write it down; compare.py puts two reports side by side.
"""

# suite: its module, which gives cells(study) and facts(study, cells)
SUITES = {
    "conditional": "conditional", "editing": "editing", "zero-shot": "zero_shot", "logic": "logic",
    "solvers": "solvers", "posterior": "posterior", "oneshot": "oneshot",
}
OURS = "ours"  # the method that is the sampler itself
