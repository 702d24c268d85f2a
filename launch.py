"""How the model's kernels are made and launched: torch.compile, bf16 copies of weights, CUDA graphs."""

import functools
import warnings

import torch

from config import UserError
from ops import Linear

WARM_UPS = 3  # calls before recording, in which libraries set themselves up and torch.compile compiles


# ---- compile


def compile_model(model, n_segments, world):
    """Compiles the blocks, as one graph for each of n_segments, and the loss's passes over logits.

    The embedding stays out: compiled, its gradient would not repeat bitwise. Evaluation runs block by block, since one
    block compiles in a tenth of the time.
    """
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8, device=world.device))
    except Exception as error:  # no compiler, no Triton, a Python too new: torch raises many classes
        if world.is_main:
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            warnings.warn(f"torch.compile does not work here, training continues without it: {reason}", stacklevel=2)
        return
    torch._dynamo.config.optimize_ddp = False  # it would cut the segments anew, at DDP's buckets
    torch._dynamo.config.suppress_errors = True  # a graph that fails to compile runs eagerly, with torch's warning
    model.loss_pass = torch.compile(model.loss_pass)
    forwards, one_by_one = [block.forward for block in model.blocks], model.run_blocks
    for block, forward in zip(model.blocks, forwards):
        block.forward = torch.compile(forward)
    if n_segments == len(forwards):
        return

    @torch.compile
    def run_segment(forwards, x, rope, masks):
        for forward in forwards:
            x = forward(x, rope, masks)
        return x

    size = -(-len(forwards) // n_segments)

    def run_blocks(x, rope=None, masks=None, caches=None):
        if not torch.is_grad_enabled():
            return one_by_one(x, rope, masks, caches)
        assert caches is None, "a cache is for generation, without gradients"
        for first in range(0, len(forwards), size):
            x = run_segment(forwards[first : first + size], x, rope, masks)
        return x

    model.run_blocks = run_blocks


# ---- copies of weights


def keep_copies(model):
    """Gives the blocks' matrices copies in bf16, which refresh_copies casts once a step.

    Autocast would cast at each micro-step, and save the same copies for backward; in a pipeline each micro-step ahead
    would save its own. The copies' gradients are added to the weights' as soon as they are there. FSDP has such copies
    of its own; DDP's buckets do not allow them.
    """
    linears = [m for m in model.blocks.modules() if isinstance(m, Linear) and m.weight.requires_grad]
    for linear in linears:
        linear.copy = linear.weight.detach().bfloat16().requires_grad_()
        linear.copy.register_post_accumulate_grad_hook(functools.partial(_add_gradient, linear.weight))
    if linears:  # none where all are frozen
        model.copies = [linear.copy for linear in linears], [linear.weight for linear in linears]


def _add_gradient(weight, copy):
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad += copy.grad
    copy.grad = None


def launch_plainly(model):
    """Ends graphs and copies, so that hooks on modules and weights see all that happens."""
    model.graphs = model.copies = None
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.copy = None


@torch.no_grad()
def refresh_copies(model):
    """Casts the weights into their copies, where there are some."""
    if model.copies:
        torch._foreach_copy_(*model.copies)


# ---- CUDA graphs


class Captured:
    """A function of tensors, replayed as a CUDA graph from its first call on.

    Inputs keep their shapes, or are None; outputs are overwritten by the next call. The first call runs the function
    WARM_UPS times to warm up, then calls undo(), which takes back what that changed, and records it, which changes
    nothing; random numbers then come as if there had been no warm-up. UserError where the function cannot be recorded.
    """

    def __init__(self, function, undo=lambda: None, warm_ups=WARM_UPS):
        self.function, self.undo, self.warm_ups = function, undo, warm_ups
        self.graph = None

    def __call__(self, *inputs):
        if self.graph is None:
            self._record(inputs)
        for static, given in zip(self.inputs, inputs, strict=True):
            if given is not None:
                static.copy_(given)
        self.graph.replay()
        return self.outputs

    def _record(self, inputs):
        self.inputs = [None if x is None else x.clone() for x in inputs]
        random_state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()  # torch's documentation asks for another stream than the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warm_ups):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(random_state)
        self.undo()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's and the saver's threads may allocate meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:  # torch cannot go on: its allocator and random numbers still record
            cause = error.__context__ or error  # ending a failed recording raises, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = next(iter(str(cause).strip().splitlines()), "")
            remedy = "train with --cuda_graphs=false, sample with --device=cpu"
            raise UserError(f"CUDA graphs do not work here ({reason}); {remedy}") from error
        self.graph = graph


def replay(graphs, name, function, *inputs, may_record=True, **options):
    """function(*inputs), by the graph of that name for inputs of these shapes, which the first such call records.

    Directly where graphs is None, or this call may not record what a warm-up would spoil. options: Captured's.
    """
    if graphs is None:
        return function(*inputs)
    by_shape, shapes = graphs.setdefault(name, {}), tuple(None if x is None else x.shape for x in inputs)
    if shapes not in by_shape:
        if not may_record:
            return function(*inputs)
        by_shape[shapes] = Captured(function, **options)
    return by_shape[shapes](*inputs)
