"""transformers says nothing while we read and write models, and afterwards what it said before."""

import threading

import pytest
import transformers

from model import ColBERT
from nanocolbert.encoder.quiet import quietly


@pytest.fixture
def loud():
    """As transformers is in a notebook."""
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


def is_loud() -> bool:
    return transformers.logging.get_verbosity() == 30 and transformers.logging.is_progress_bar_enabled()


def test_models_are_read_and_written_without_a_word(loud, colbert, encoder_dir, tmp_path, capfd):
    for layout in ("nanocolbert", "pylate"):
        colbert.save_pretrained(tmp_path / layout, layout=layout)
        ColBERT.from_pretrained(tmp_path / layout)
    ColBERT.from_base(encoder_dir, dim=16)
    assert capfd.readouterr().err == "" and is_loud()
    transformers.AutoModel.from_pretrained(encoder_dir)
    assert "Loading weights" in capfd.readouterr().err  # that of others is as it was


def test_the_last_block_makes_it_as_it_was(loud):
    """Blocks of several threads that overlap, and one that ends by an exception."""
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first() -> None:
        with quietly():
            first_is_in.set()
            second_is_in.wait()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait()
    with pytest.raises(ValueError), quietly():
        second_is_in.set()
        thread.join()
        assert not transformers.logging.is_progress_bar_enabled()
        raise ValueError
    assert is_loud()
