"""Compared systems of your own: one file each, named as the system and listed in ``comparison.own`` of params.yaml.

``awares.baselines`` imports a file when its name is used. The stage ``own_systems@<profile>-<name>`` depends on that
file only.
"""
