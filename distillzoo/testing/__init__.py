"""The contract battery: thirteen checks that every distiller passes, usable by authors of distillers outside this package.

One call runs them all and says in sentences what is wrong::

    from distillzoo.testing import check_distiller

    check_distiller(MyDistiller)

or a test runs every point of its own::

    @pytest.mark.parametrize("name", list(CHECKS))
    def test_contract(name):
        CHECKS[name](Subject(MyDistiller))
"""

from distillzoo.testing.battery import CHECKS, check_distiller
from distillzoo.testing.networks import TinyNet, TinyTeacher, tiny_data, tiny_pair
from distillzoo.testing.subject import Check, ContractError, Loop, Subject, TinyLoader

__all__ = [
    "CHECKS",
    "Check",
    "ContractError",
    "Loop",
    "Subject",
    "TinyLoader",
    "TinyNet",
    "TinyTeacher",
    "check_distiller",
    "tiny_data",
    "tiny_pair",
]
