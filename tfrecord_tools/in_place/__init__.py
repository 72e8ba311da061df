"""tfrecord_tools/in_place"""
