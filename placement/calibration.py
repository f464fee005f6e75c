"""How much of a data sheet is reached: measured efficiencies and overheads of a device, read from a JSON file.

`calibrations/nvidia_h200.json` was fitted to `benchmarks/results/engine_h200.jsonl` by
`benchmarks/planner/fit_calibration.py`; devices without a file of their own take its ratios with their own peaks.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from argosy.cluster.protocol.errors import ConfigError

FOLDER: Final = Path(__file__).with_name("calibrations")
_FILES: Final = {"H200": "nvidia_h200.json", "CPU": "cpu.json"}


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far off forecasts of a kind were, of rows that were measured on the device: as parts of what was measured."""

    kind: str  # such as "decode step"
    rows: int
    middle: float  # half of them were nearer
    most: float  # too high or, below 0, too low
    row: str  # which that was


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ratios to the data sheet's peaks, and microseconds that no data sheet tells."""

    device: str
    source: str
    judged: tuple[Judged, ...] = ()
    # arithmetic and memory
    weight_efficiency: float = 0.9  # of the memory's bandwidth, when weights are read
    kv_efficiency: float = 0.75  # the same for keys and values
    # measured alone, as attention of one and eight rows over 1024 and 2048 tokens (kv_h200.jsonl): 12.6 and 23.7 us
    context_ns: float = 0.0  # how long a decode's attention takes for a token of a context, one after the other
    piece_tokens: int = 512  # longer contexts are cut into pieces, at least so long, that run side by side
    attention_programs: int = 132  # that run at once: pieces of all rows and key/value heads, if these alone are fewer,
    many_pieces: int = 8  # else so many times as many
    join_us: float = 0.0  # to put pieces together
    shared_reads: float = 0.0  # of the reads of a prefix that decodes have in common, the part that is saved
    flops_efficiency: tuple[tuple[float, float], ...] = ((16.0, 0.5), (256.0, 0.65), (8192.0, 0.7))  # by tokens
    attention_efficiency: float = 0.35  # of the arithmetic, for prompts
    overlap: float = 3.0  # how reading and arithmetic hide each other: infinite is max(), 1 is their sum
    # overheads, microseconds
    step_us: float = 200.0  # of a step's last stage, which draws tokens and answers
    stage_us: float = 40.0  # of each stage before it
    layer_us: float = 12.0
    group_layer_us: float = 12.0  # a layer's further overhead when several ranks share it
    row_us: float = 0.3  # of each row of a step, shared out over all layers
    state_passes: float = 0.0  # how often a layer's norms, gate and rotation read or write its hidden states
    fp8_layer_us: float = 0.0  # a layer's further overhead with FP8 weights: its inputs are rounded, too
    few_rows: int = 8  # so few tokens go through a layer in fewer launches: without what follows,
    apart_us: float = 0.0  # a layer's further overhead, and what FP8 adds where `chains` has the layer
    chains: tuple[str, ...] = ()  # layers that have few launches for one token: width x heads' x inner numbers x ranks
    chain_sums: float = 1.0  # of what a group adds to such a layer, the part that is left within a launch
    rings: tuple[str, ...] = ()  # layers of 16 bits, named like these, where products of few rows hide behind reading,
    ring_us: float = 0.0  # and what a layer gains besides, whose weights come while it waits for something else
    ring_rows: int = 64  # so many go by rings where a group shares a layer,
    ring_sums: float = 1.0  # and of what the group adds to it, this part is left: weights come while its ranks wait
    fp8_flops_ratio: float = 1.0  # of the share of peak that 16-bit products reach
    eager_layer_us: float = 60.0  # the host's time for a layer of a step that is no recorded graph
    request_us: float = 2000.0  # from arrival to the first step, and from the last step to the caller
    # of a start, beside its steps; 0: nobody measured it
    start_seconds: float = 0.0  # Python, imports, the device
    start_group_seconds: float = 0.0  # of several ranks
    start_kernel_us: float = 0.0  # to launch a kernel the first time, and record it
    start_group_kernel_us: float = 0.0  # the same of what several ranks tell each other, on all their kernels
    # communication
    reduce_latency: float = 2.2  # times the link's latency, for two ranks
    reduce_rank_latency: float = 0.2  # the same for each further rank
    reduce_efficiency: float = 0.5  # of the link's bandwidth
    hidden_sums: float = 0.0  # of what long steps sum, the part that products hide
    hop_us: float = 14.0  # of a stage's hand-over, beside the link's latency
    host_link_efficiency: float = 0.9
    # memory
    hidden_copies: float = 4.0  # hidden states that live at once in the largest step
    inner_copies: float = 3.0  # the same for the MLP's inner width
    fp8_inner_copies: float = 3.0  # the same with FP8 weights
    unpacked_bytes: int = 0  # for keys and values of a cache in 8 bits, made plain for prompts (`kernels/kv_unpack.py`)
    logit_bytes: float = 16.0  # a row and vocabulary entry, while sampling
    gathered_logit_bytes: float = 16.0  # the same where the ranks of a group gather them
    records_graphs: bool = False  # whether decode steps are recorded
    workspace_bytes: int = 700 * 2**20  # context, libraries, loaded kernels
    context_bytes: int = 550 * 2**20  # of these the context, which is there first
    group_bytes: int = 400 * 2**20  # of a communicator
    second_group_bytes: int = 200 * 2**20  # of one more

    def flops_share(self, num_tokens: float) -> float:
        """The share of peak arithmetic that a product of so many tokens reaches; linear between the measured ones."""
        table = self.flops_efficiency
        if num_tokens <= table[0][0]:
            return table[0][1]
        for (low, low_share), (high, high_share) in pairwise(table):
            if num_tokens <= high:
                return low_share + (high_share - low_share) * (num_tokens - low) / (high - low)
        return table[-1][1]


def read_calibration(path: str | Path) -> Calibration:
    """A calibration file. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"calibration file {path}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"calibration file {path}: {error}") from error


@cache
def default_calibration(device: str) -> Calibration:
    """The calibration that ships for a device; the H200's ratios for those without one."""
    return read_calibration(FOLDER / _FILES.get(device, _FILES["H200"]))
