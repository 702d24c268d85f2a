"""CUDA graphs: a function's kernels, recorded once and launched together, where the host is slower than the GPU."""

import warnings

import torch

WARM_UPS = 3  # calls before recording, in which libraries set themselves up and torch.compile compiles


class Captured:
    """A function of tensors, replayed as a CUDA graph from its first call on.

    Inputs keep their shapes; outputs are overwritten by the next call. The first call runs the function WARM_UPS times
    to warm up, then calls undo(), which takes back what that changed, and records it, which changes nothing; random
    numbers then come as if there had been no warm-up. Where recording fails, calls run the function itself, with one
    warning.
    """

    def __init__(self, function, undo=lambda: None, warm_ups=WARM_UPS):
        self.function, self.undo, self.warm_ups = function, undo, warm_ups
        self.graph, self.inputs, self.outputs = None, None, None

    def __call__(self, *inputs):
        if self.graph is None:
            self._record(inputs)
        if not self.graph:
            return self.function(*inputs)
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self.outputs

    def _record(self, inputs):
        self.inputs = [x.clone() for x in inputs]
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
            self.graph = graph
        except RuntimeError as error:
            self.undo()
            self.graph = False
            reason = next(iter(str(error).strip().splitlines()), "")
            warnings.warn(f"CUDA graphs do not work here, kernels are launched one by one: {reason}", stacklevel=3)


def replay(graphs, name, function, *inputs, **options):
    """function(*inputs), by the graph of that name, which the first call records; directly where graphs is None.

    options: Captured's, for the first call.
    """
    if graphs is None:
        return function(*inputs)
    if name not in graphs:
        graphs[name] = Captured(function, **options)
    return graphs[name](*inputs)
