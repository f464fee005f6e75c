"""A plan as a picture: a box for each node, in it its GPUs, coloured by replica, with stage, rank and layers."""

from collections.abc import Iterator
from html import escape
from typing import Final

from argosy.placement.plan import RankInfo
from argosy.placement.plan_report import PlanReport

COLOURS: Final = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
_GPU_WIDTH, _GPU_HEIGHT, _GAP, _HEAD, _NODES_A_ROW = 92, 74, 8, 26, 4
_MAX_NODES: Final = 64


def plan_svg(report: PlanReport) -> str:
    """The picture as SVG text. Nodes beyond the 64th are counted, not drawn."""
    ranks = {
        (rank.node, rank.gpu if rank.gpu is not None else rank.tp_rank): (number, rank)
        for number, replica in enumerate(report.plan.replicas)
        for rank in replica.ranks
    }
    nodes = report.topology.nodes[:_MAX_NODES]
    across = min(4, max((len(node.gpus) for node in nodes), default=1))
    down = max((-(-len(node.gpus) // across) for node in nodes), default=1)
    width = across * (_GPU_WIDTH + _GAP) + _GAP
    height = down * (_GPU_HEIGHT + _GAP) + _GAP + _HEAD
    in_row = min(_NODES_A_ROW, len(nodes)) or 1
    rows = -(-len(nodes) // in_row)
    total_width, total_height = in_row * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP + 2 * _HEAD
    title = f"{report.model.name}: {report.chosen.describe()}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{_GAP}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for place, node in enumerate(nodes):
        left = _GAP + (place % in_row) * (width + _GAP)
        top = _HEAD + _GAP + (place // in_row) * (height + _GAP)
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="#f4f4f4" '
                     'stroke="#888"/>')  # fmt: skip
        name = f"{node.node_id}: {node.describe_gpus()}"
        parts.append(f'<text x="{left + _GAP}" y="{top + 17}" font-weight="bold">{escape(name)}</text>')
        for seat, gpu in enumerate(node.gpus):
            x = left + _GAP + (seat % across) * (_GPU_WIDTH + _GAP)
            y = top + _HEAD + (seat // across) * (_GPU_HEIGHT + _GAP)
            parts += _draw_gpu(x, y, f"GPU {gpu.index}", ranks.get((node.node_id, gpu.index)))
    left_out = len(report.topology.nodes) - len(nodes)
    more = f"; {left_out} nodes more are not drawn" if left_out else ""
    line = f"{report.chosen.tokens_per_second:,.0f} output tokens/s, {report.chosen.num_blocks:,} KV blocks{more}"
    parts.append(f'<text x="{_GAP}" y="{total_height - 8}">{escape(line)}</text></svg>')
    return "\n".join(parts) + "\n"


def _draw_gpu(x: int, y: int, name: str, sits: tuple[int, RankInfo] | None) -> Iterator[str]:
    colour = "#dddddd" if sits is None else COLOURS[sits[0] % len(COLOURS)]
    opacity = 1.0 if sits is None else 1.0 - 0.5 * sits[1].pp_rank / max(1, sits[1].pp_size)
    yield (f'<rect x="{x}" y="{y}" width="{_GPU_WIDTH}" height="{_GPU_HEIGHT}" rx="4" fill="{colour}" '
           f'fill-opacity="{opacity:.2f}" stroke="#555"/>')  # fmt: skip
    lines = [name, "not used"]
    if sits is not None:
        number, rank = sits
        lines = [
            name,
            f"replica {number} rank {rank.global_rank}",
            f"stage {rank.pp_rank}, TP {rank.tp_rank}",
            f"layers {rank.first_layer}-{rank.last_layer - 1}",
        ]
    for place, text in enumerate(lines):
        yield f'<text x="{x + 5}" y="{y + 16 + 16 * place}">{escape(text)}</text>'
