"""A range of the layers of a model that transformers made: a pipeline stage of what we have no layers for.

The model runs as it is, with its embedding and its final norm; layers of other stages hand on what they are given, the
first of ours gets what the stage before us made, and what the last of ours makes is kept. T = tokens, D = model width.
"""

from typing import Any

from torch import Tensor, nn


def layers_of(model: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The list of the model's layers, each with an attention that knows its number; None: there is no such list."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            numbers = [
                {part.layer_idx for part in layer.modules() if isinstance(getattr(part, "layer_idx", None), int)}
                for layer in module
            ]
            if numbers == [{number} for number in range(num_layers)]:
                return module
    return None


class StrangersStage:
    """The layers [first, last) of `layers`; the others do nothing until `undo`."""

    def __init__(self, layers: nn.ModuleList, first: int, last: int):
        self.layers, self.first, self.last = layers, first, last
        self.given_TD: Tensor | None = None  # what the stage before made; None: we are the first
        self._made: Any = None
        for number, layer in enumerate(layers):
            if not first <= number < last:
                layer.forward = self._hand_on
        self._hooks = [
            layers[first].register_forward_pre_hook(self._take, with_kwargs=True),
            layers[last - 1].register_forward_hook(self._keep),
        ]
        self.gives_tuple = False  # whether a layer's output is (hidden state, ..), learnt from ours

    @property
    def made_TD(self) -> Tensor:
        """What the last of our layers made."""
        made: Tensor = self._made[0] if isinstance(self._made, tuple) else self._made
        return made[0]

    def undo(self) -> None:
        """All layers run again."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        for hook in self._hooks:
            hook.remove()

    def empty(self) -> None:
        """Let go of the weights of other stages."""
        for number, layer in enumerate(self.layers):
            if not self.first <= number < self.last:
                layer._modules.clear()
                layer._parameters.clear()

    def _hand_on(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        return (hidden_states,) if self.gives_tuple else hidden_states

    def _take(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.given_TD is None:
            return None
        given = self.given_TD[None]
        if args:
            return (given, *args[1:]), options
        return args, {**options, "hidden_states": given}

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._made, self.gives_tuple = output, isinstance(output, tuple)
