"""A simulator of the cluster manager: two nodes' `Manager`s, with their real packets, on a virtual clock.

What is simulated is what they stand on: paths that lose, delay and are cut, in one direction or both; nodes that are
paused, lose power, boot; daemons that are killed and started again; resources that start, stop and fail in their own
time, among them an address with its lease in the kernel. The rules are checked after every step:

- *one holder*: no two nodes show the address of a group, or have it promoted where it is replicated, but while one of
  them cannot know better: it was paused, cut off, or has had no time yet to hear of the other;
- *fenced first*: a replicated group is never promoted on two nodes at all;
- *after a pause*: no address is shown before somebody was heard, or listened for long enough;
- *in order*: a group's resources run only on top of those before them;
- *it goes on*: when all is well again, each group runs on one node, the preferred one if it is to fail back.
"""
