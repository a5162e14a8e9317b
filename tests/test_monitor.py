"""What hosts log of their batches, as one line."""

from __future__ import annotations

from emu2_jax.monitor import merge_info


def test_counts_add_up_shares_are_means_and_the_rest_is_the_worst() -> None:
    infos = [
        {"tokens": 100, "padding_share": 0.1, "epoch/pairs": 1, "data_queue_depth": 2, "source": "pairs+text"},
        {"tokens": 60, "padding_share": 0.3, "epoch/pairs": 0, "data_queue_depth": 0, "source": "pairs"},
        {"tokens": 40, "padding_share": 0.2, "samples/text": 3, "data_queue_depth": 1, "source": "grit"},
    ]
    assert merge_info(infos) == {
        "tokens": 200,
        "padding_share": 0.6000000000000001 / 3,
        "epoch/pairs": 1,
        "data_queue_depth": 0,
        "source": "grit+pairs+text",
        "samples/text": 3,
    }


def test_what_one_host_says_stays_as_it_is() -> None:
    info = {"source": "pairs", "tokens": 3, "padding_share": 0.25, "anything": 1.5}
    assert merge_info([info]) == info
