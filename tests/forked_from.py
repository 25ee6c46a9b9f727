"""Imported by the process that ranks are forked from, and by no other, so that it ends with the test run.

By itself it would live for as long as its ranks do, and they for as long as it does.
"""

from tests.processes import end_with_parent

end_with_parent()
