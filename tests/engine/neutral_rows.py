"""Rows of a sampler that change nothing, for tests to fill in."""

import numpy as np

from pallasite.engine.sampler import SamplingRows


def neutral_rows(num_rows: int, num_bans: int) -> SamplingRows:
    """Returns greedy rows without any processing, as numpy arrays."""

    def filled(value: int | float, dtype: type) -> np.ndarray:
        return np.full((num_rows,), value, dtype)

    return SamplingRows(
        temperature=filled(0.0, np.float32),
        top_k=filled(0, np.int32),
        top_p=filled(1.0, np.float32),
        min_p=filled(0.0, np.float32),
        repetition_penalty=filled(1.0, np.float32),
        presence_penalty=filled(0.0, np.float32),
        frequency_penalty=filled(0.0, np.float32),
        seed=filled(0, np.int32),
        output_index=filled(0, np.int32),
        slot=filled(0, np.int32),
        has_bias=filled(False, np.bool_),
        num_logprobs=filled(-1, np.int32),
        bans=np.full((num_rows, num_bans, 2), -1, np.int32),
        last_token=filled(0, np.int32),
        drafts=np.zeros((num_rows, 0), np.int32),
    )
