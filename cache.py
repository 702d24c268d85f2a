"""Keys and values of the tokens so far, so that generation computes each token once."""

import functools
import math

import torch


class Cache:
    """Keys and values of the tokens so far, for generation: one preallocated tensor per layer."""

    class Layer:
        def __init__(self, window, shape, **kind):
            self.window, self.length = window, 0
            self.k, self.v = torch.zeros(shape, **kind), torch.zeros(shape, **kind)  # a mask hides no NaN

        def append(self, k, v):
            """Appends k and v (B, H, T, D); returns views of all tokens so far, or of those that a single one sees."""
            end = self.length + k.shape[2]
            first = max(0, end - self.window) if self.window and k.shape[2] == 1 else 0
            self.k[:, :, self.length : end] = k
            self.v[:, :, self.length : end] = v
            self.length = end
            return self.k[:, :, first:end], self.v[:, :, first:end]

        def put(self, place, k, v):
            """Writes k and v (B, H, 1, D) at place, a tensor, (1,) or (B, 1); returns all, which needs a mask."""
            index = place.view(-1, 1, 1, 1).expand_as(k)  # B H 1 D
            return self.k.scatter_(2, index, k), self.v.scatter_(2, index, v)

    def __init__(self, cfg, batch_size, device, dtype, n_tokens=None):
        """n_tokens: the capacity; None: block_size."""
        shape = (batch_size, cfg.kv_heads, n_tokens or cfg.block_size, cfg.head_width)
        windows = [cfg.window_of(layer) for layer in range(cfg.n_layer)]
        self.layers = [Cache.Layer(window, shape, device=device, dtype=dtype) for window in windows]

    @property
    def length(self):
        """Tokens in the cache; those put at a place do not count."""
        return self.layers[0].length

    def clear(self):
        """Forgets every token."""
        for layer in self.layers:
            layer.length = 0

    def by_layer(self, place=None):
        """A function for each layer, which adds keys and values at the end, or at place, and returns all."""
        return [layer.append if place is None else functools.partial(layer.put, place) for layer in self.layers]

    def mask(self, place, window=None):
        """The mask (1 or B, 1, 1, S) that attention adds to its scores: -inf behind place and before the window."""
        k = self.layers[0].k
        at = torch.arange(k.shape[2], device=k.device)
        unseen = at > place if window is None else (at > place) | (at <= place - window)
        unseen = unseen.view(-1, 1, 1, len(at))
        return torch.zeros(unseen.shape, device=k.device, dtype=k.dtype).masked_fill(unseen, -math.inf)
