"""The ranks of :mod:`ranks`, which distributed tests share: a failure is that of one test."""

import os

import pytest
from ranks import Pool


def exits(group):
    if group.rank() == 1:
        os._exit(3)


def fails(group):
    assert group.rank() != 2, "a message of its own"


def works(group):
    pass


@pytest.mark.xdist_group("ranks")  # whose worker has imported what their processes need
@pytest.mark.parametrize(
    ("function", "message"),
    [(exits, "^rank 1: died$"), (fails, r"(?s)^rank 2: Traceback.* in fails.*a message of its own")],
)
def test_failing_function_fails_its_own_test_alone(function, message):
    own = Pool()
    try:
        with pytest.raises(pytest.fail.Exception, match=message):
            own.run(function)
        own.run(works)
    finally:
        own.close()
