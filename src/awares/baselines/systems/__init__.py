"""Compared systems of your own: one file each, named as the system and listed in ``comparison.own`` of params.yaml.

``awares.baselines`` imports it when the name comes up; the stage ``own_systems@<profile>-<name>`` depends on that file alone.
"""
