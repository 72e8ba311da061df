"""tfrecord_tools/tables"""
