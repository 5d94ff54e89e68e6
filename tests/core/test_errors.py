"""What libraries raise, as one sentence."""

import pytest

from pipeline.core.errors import ConfigError, PipelineError, explained


def test_an_exception_becomes_a_sentence_with_what_helps() -> None:
    with pytest.raises(PipelineError) as raised, explained("a.parquet cannot be read", "see fgsm verify"):
        raise ValueError("\ntoo short\nmore")
    assert str(raised.value) == "a.parquet cannot be read (too short); see fgsm verify."
    assert isinstance(raised.value.__cause__, ValueError)


def test_without_a_fix_the_reason_ends_it() -> None:
    with pytest.raises(ConfigError) as raised, explained("user/images cannot be read", kind=ConfigError):
        raise OSError("too short")
    assert str(raised.value) == "user/images cannot be read: too short"


def test_what_is_a_sentence_already_or_a_bug_passes() -> None:
    for errors, raised in (((Exception,), PipelineError("a sentence")), ((OSError,), KeyError("a bug"))):
        with pytest.raises(type(raised)) as passed, explained("a.parquet cannot be read", errors=errors):
            raise raised
        assert passed.value is raised


def test_a_sentence_whose_kind_is_named_is_explained() -> None:
    with pytest.raises(PipelineError, match=r"^row 7: no image$"), explained("row 7", errors=(ConfigError,)):
        raise ConfigError("no image")
