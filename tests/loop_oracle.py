"""Native sparse attention in plain Python loops over one document, following the paper.

This is an independent check of `fsa_jax.reference`, in float64 and without masks, segment tables or
JAX. `pack` runs it on each document. Shapes are as in fsa_jax.api, without the batch axis.
"""

import math

import numpy as np


def documents(segment_ids):
    """Returns (first, one past the last) token of each run of equal nonzero ids."""
    found, start = [], 0
    for t in range(1, len(segment_ids) + 1):
        if t == len(segment_ids) or segment_ids[t] != segment_ids[start]:
            if segment_ids[start] > 0:
                found.append((start, t))
            start = t
    return found


def attend(query, keys, values, scale):
    """Softmax attention of one query vector to lists of keys and values: (out, lse)."""
    if not len(keys):
        return np.zeros(values.shape[-1]), -math.inf
    logits = [scale * float(np.dot(query, key)) for key in keys]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    out = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out, top + math.log(sum(weights))


def windows_seen(t, length, kernel_size, kernel_stride):
    """Returns the indices of the document's complete windows that end at or before position t."""
    starts = range(0, length - kernel_size + 1, kernel_stride)
    return [i for i, start in enumerate(starts) if start + kernel_size - 1 <= t]


def compress(x, kernel_size, kernel_stride, phi):
    """Compresses [T, K, D] of one document to [windows, K, D]; phi maps [l, K, D] to [K, D]."""
    starts = range(0, len(x) - kernel_size + 1, kernel_stride)
    found = [phi(x[start : start + kernel_size]) for start in starts]
    return np.array(found).reshape(len(found), *x.shape[1:])


def block_scores(p, blocks, config):
    """Returns block scores: each window counts p times the strides it shares with the block."""
    per_window = config.kernel_size // config.kernel_stride
    per_block = config.block_size // config.kernel_stride
    scores = [0.0] * blocks
    for window, weight in p.items():
        for unit in range(window, window + per_window):
            if unit // per_block < blocks:
                scores[unit // per_block] += weight
    return scores


def choose(t, scores, config):
    """Returns the block indices of position t."""
    own = t // config.block_size
    forced = [j for j in range(own + 1) if j < config.init_blocks or j > own - config.local_blocks]
    others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    chosen = sorted((forced + others)[: config.topk])
    return chosen + [-1] * (config.topk - len(chosen))


def one_document(query, key, value, compressed_key, compressed_value, config, scale, lists=None):
    """All branches for one document: a dict of compressed, indices, selected and window."""
    length, heads, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    width = value.shape[-1]
    out = {
        name: (np.zeros((length, heads, width)), np.full((length, heads), -math.inf))
        for name in ("compressed", "selected", "window")
    }
    indices = np.full((length, kv_heads, config.topk), -1, np.int32)
    for t in range(length):
        seen = windows_seen(t, length, config.kernel_size, config.kernel_stride)
        for k in range(kv_heads):
            p = dict.fromkeys(seen, 0.0)
            for n in range(k * group, (k + 1) * group):
                keys, values = compressed_key[seen, k], compressed_value[seen, k]
                result = attend(query[t, n], keys, values, scale)
                out["compressed"][0][t, n], out["compressed"][1][t, n] = result
                for i in seen:
                    logit = scale * float(np.dot(query[t, n], compressed_key[i, k]))
                    p[i] += math.exp(logit - result[1])
            blocks = -(-length // config.block_size)
            indices[t, k] = choose(t, block_scores(p, blocks, config), config)
            listed = set((indices if lists is None else lists)[t, k].tolist())
            chosen = [s for s in range(t + 1) if s // config.block_size in listed]
            near = list(range(max(0, t - config.window_size + 1), t + 1))
            for n in range(k * group, (k + 1) * group):
                for name, tokens in (("selected", chosen), ("window", near)):
                    result = attend(query[t, n], key[tokens, k], value[tokens, k], scale)
                    out[name][0][t, n], out[name][1][t, n] = result
    return {**out, "indices": indices}


def pack(segment_ids, query, key, value, config, scale, phi, lists=None):
    """Runs `one_document` on each document; padding has out 0, lse -inf and block indices -1."""
    length, heads, _ = query.shape
    width = value.shape[-1]
    total = {
        name: (np.zeros((length, heads, width)), np.full((length, heads), -math.inf))
        for name in ("compressed", "selected", "window")
    }
    indices = np.full((length, key.shape[1], config.topk), -1, np.int32)
    for start, end in documents(segment_ids):
        part = slice(start, end)
        size = (config.kernel_size, config.kernel_stride)
        ck, cv = (compress(x[part], *size, phi) for x in (key, value))
        own_lists = None if lists is None else lists[part]
        one = one_document(query[part], key[part], value[part], ck, cv, config, scale, own_lists)
        for name in total:
            total[name][0][part], total[name][1][part] = one[name]
        indices[part] = one["indices"]
    return {**total, "indices": indices}
