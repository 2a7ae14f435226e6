"""The PyTorch side of the benchmarks: one JSON request a line on stdin, one answer a line on stdout.

Run by `benchmarks/peer.py`; it needs the extra `bench`. Float32, every core.
"""

from collections.abc import Callable
from importlib import import_module
import json
import os
import sys
import time
from typing import Any

# By name, so that a type checker does not ask for packages that are optional.
torch: Any = import_module("torch")
mixtral: Any = import_module("transformers.models.mixtral.modeling_mixtral")

GROUPED = "grouped_mm"  # the fastest of transformers' implementations of experts on the CPU


class Dense(torch.nn.Module):
    """SwiGLU MLP of hidden width `hidden`, both input projections as one product."""

    def __init__(self, width: int, hidden: int):
        """Draws the weights as `torch.nn.Linear` does."""
        super().__init__()
        self.wi = torch.nn.Linear(width, 2 * hidden, bias=False)
        self.wo = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any) -> Any:
        """`[T D] -> [T D]`."""
        gate, up = self.wi(x).chunk(2, dim=-1)
        return self.wo(torch.nn.functional.silu(gate) * up)


def config(**sizes: Any) -> Any:
    """Of a Mixtral with grouped experts."""
    return mixtral.MixtralConfig(experts_implementation=GROUPED, **sizes)


def layers(T: int, D: int, F: int, E: int, K: int) -> dict[str, Callable]:
    """Forward and backward of one dense and one sparse layer, gradients of weights and tokens."""
    sizes = {"hidden_size": D, "intermediate_size": F}
    sizes |= {"num_local_experts": E, "num_experts_per_tok": K}
    sparse = mixtral.MixtralSparseMoeBlock(config(**sizes))
    with torch.no_grad():  # the block leaves its weights as memory was
        for weight in sparse.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    x = torch.randn(8, T // 8, D)
    flat = x.reshape(T, D)
    return {"dense": both(Dense(D, K * F), flat), "sparse": both(sparse, x)}


def both(module: Any, x: Any) -> Callable:
    """The module's output and gradients, as a function of nothing."""
    x = x.clone().requires_grad_()
    wanted, cotangent = [*module.parameters(), x], torch.randn_like(x)

    def run() -> Any:
        output = module(x)
        return output, torch.autograd.grad(output, wanted, cotangent)

    return run


def language_model(batch: int, length: int, clip_norm: float, **sizes: Any) -> dict[str, Any]:
    """Training steps of MixtralForCausalLM, as it is and compiled, or why that could not be."""
    kinds: dict[str, Any] = {"eager": step(batch, length, clip_norm, False, sizes)}
    try:
        compiled = step(batch, length, clip_norm, True, sizes)
        compiled()
        kinds["compiled"] = compiled
    except Exception as error:  # whatever the compiler raises is the note
        kinds["note"] = f"torch.compile failed, {type(error).__name__}: {str(error)[:200]}"
    return kinds


def step(batch: int, length: int, clip_norm: float, compiled: bool, sizes: dict) -> Callable:
    """One whole step: loss with the router's balance loss, gradients, clipping, AdamW."""
    torch.manual_seed(0)
    model = mixtral.MixtralForCausalLM(
        config(**sizes, attn_implementation="sdpa", output_router_logits=True, use_cache=False)
    ).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, sizes["vocab_size"], (batch, length))

    def once() -> None:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def seconds(run: Callable) -> float:
    """Of one run; what it returned is freed outside."""
    started = time.perf_counter()
    kept = run()
    taken = time.perf_counter() - started
    del kept
    return taken


class Desk:
    """Answers requests; keeps what was made last."""

    def __init__(self) -> None:
        self.runs: dict[str, Callable] = {}

    def answer(self, request: str, values: dict[str, Any]) -> Any:
        """One request: `layers`, `language_model` with sizes, or `run` with a name."""
        if request == "run":
            return seconds(self.runs[values["name"]])
        self.runs = {}  # frees the memory of what was there before
        made = {"layers": layers, "language_model": language_model}[request](**values)
        self.runs = {name: run for name, run in made.items() if callable(run)}
        return {"runs": [*self.runs], "note": made.get("note", "")}


def main() -> None:
    """Answers until stdin ends; anything that libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    desk = Desk()
    for line in sys.stdin:
        values = json.loads(line)
        try:
            told = {"answer": desk.answer(values.pop("request"), values)}
        except Exception as error:  # goes to the parent, which raises it
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
