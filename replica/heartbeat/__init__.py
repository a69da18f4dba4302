"""The cluster manager: who is alive, who runs what, and how a node that must not run it any more is stopped.

packet · membership (pure) · start_number what a heartbeat says, and what is believed of it
links · sockets · ping                    heartbeats on several paths, and whether the network works
decide (pure)                             one snapshot → one decision: a sentence and effects
group · agents/                           a group's resources started, watched and stopped in order
fencing · consent                         whether a group may be taken without its holder's word
settings · ha_d · toml                    the same settings from ha.cf and from [heartbeat]
daemon · control                          one process for each node, `replica-heartbeat`
"""
