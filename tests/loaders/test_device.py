from tests.loaders.conftest import encode


def test_x() -> None:
    assert encode
