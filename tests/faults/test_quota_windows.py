# SPDX-License-Identifier: Apache-2.0
"""A write window at the edge of the quota."""

from stage import PAGE, Stage


def test_charges_given_back_to_make_room_are_not_taken_again_unpaid(stage: Stage) -> None:
    guest = stage.guest(quota=4, write_window=8)
    guest.read(0)
    guest.call("write", offset=12 * PAGE, given_hex="01")  # 12 to 15 are charged, 12 is copied
    assert guest.account.status().private_pages == 4
    guest.call("write", offset=9 * PAGE, given_hex="01")  # 9 to 15 would be, and 13 to 15 go back
    assert guest.account.status().private_pages <= 4
    for page in (10, 11):
        guest.call("write", offset=page * PAGE, given_hex="01")
    assert guest.account.status().private_pages == 4
    assert stage.audit().mismatches == []
