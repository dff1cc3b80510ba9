import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv_transfer import messages as m


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_block_ids_survive_the_wire(ids: list[int]) -> None:
    assert m.unpack_blocks(m.pack_blocks(ids)).tolist() == ids


def test_messages_survive_the_wire() -> None:
    want = (m.WantBlocks(m.pack_blocks([0, 1]), m.pack_blocks([7, 5])),)
    sent = m.Reserve(2**63 - 1, "t", b"h" * 16, 5, want)
    received = m.decode(m.encode(sent))
    assert received == sent
    assert np.array_equal(m.unpack_want(received.want)[0].block, [7, 5])


def test_uneven_wants_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        m.unpack_want([m.WantBlocks(m.pack_blocks([0]), m.pack_blocks([7, 5]))])
    with pytest.raises(ValueError, match="multiple"):
        m.unpack_blocks(b"abc")
